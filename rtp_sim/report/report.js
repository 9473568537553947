// The interactive parts of the report: choosing a strategy, and the timeline on a canvas (zoom, pan, tooltip).
// Spans arrive per track as [op, start minus previous start, duration] columns in ns, ordered and never overlapping.
"use strict";
(() => {
  const GUTTER = 150, AXIS = 26, ROW = 20, RANK_GAP = 22, MIN_WINDOW_NS = 20;
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);

  function choose(selectId, show) {
    const select = byId(selectId);
    if (!select) return;
    select.addEventListener("change", () => show(Number(select.value)));
    show(Number(select.value));
  }

  function showMemory(index) {
    const panels = document.querySelectorAll("[data-memory-panel]");
    panels.forEach((panel) => { panel.hidden = Number(panel.dataset.memoryPanel) !== index; });
    root.dataset.memoryShown = String(index);
  }

  // `ns` in the unit that suits `span`, with the decimals that tell steps of `step` ns apart.
  function formatNs(ns, span, step = span / 1000) {
    const [scale, unit] = span >= 1e9 ? [1e9, "s"] : span >= 1e6 ? [1e6, "ms"] : span >= 1e3 ? [1e3, "us"] : [1, "ns"];
    const digits = Math.max(0, Math.ceil(Math.log10(scale / Math.max(1, step)) - 1e-9));
    return `${(ns / scale).toFixed(digits)} ${unit}`;
  }

  function tickStep(span, count) {
    const raw = span / count, magnitude = 10 ** Math.floor(Math.log10(raw));
    return Math.max(1, [1, 2, 5, 10].map((m) => m * magnitude).find((step) => step >= raw));
  }

  function decode(track) {
    const n = track.op.length, start = new Float64Array(n), end = new Float64Array(n);
    let at = 0;
    for (let i = 0; i < n; i++) {
      at += track.start[i];
      start[i] = at;
      end[i] = at + track.dur[i];
    }
    return { name: track.name, op: track.op, start, end };
  }

  // The first span that ends after `time`; spans do not overlap, so ends ascend as starts do.
  function firstEndingAfter(end, time) {
    let low = 0, high = end.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (end[middle] > time) high = middle; else low = middle + 1;
    }
    return low;
  }

  function layOut(strategy) {
    let y = AXIS;
    const rows = [];
    for (const rank of strategy.ranks) {
      rows.push({ heading: rank.label, y });
      y += RANK_GAP;
      for (const track of rank.tracks) {
        rows.push({ ...decode(track), table: strategy.tables[rank.table], rank: rank.label, y });
        y += ROW;
      }
      y += 6;
    }
    return { rows, height: y + 4, details: strategy.details, stepNs: Math.max(1, strategy.step_ns), name: strategy.name };
  }

  function timeline(strategies) {
    const canvas = byId("timeline-canvas"), pen = canvas.getContext("2d"), tip = byId("tip");
    let chart = null, from = 0, to = 1, width = 0, drag = null, pending = false;

    const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
    const xOf = (ns) => GUTTER + (ns - from) / (to - from) * (width - GUTTER);
    const nsOf = (x) => from + (x - GUTTER) / (width - GUTTER) * (to - from);

    function redraw() {
      if (pending) return;
      pending = true;
      requestAnimationFrame(() => { pending = false; draw(); });
    }

    function resize() {
      const ratio = window.devicePixelRatio || 1;
      width = canvas.parentElement.clientWidth;
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(chart.height * ratio);
      canvas.style.height = `${chart.height}px`;
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    }

    function drawAxis(colours) {
      const step = tickStep(to - from, Math.max(3, Math.floor((width - GUTTER) / 110)));
      pen.fillStyle = colours.muted;
      pen.strokeStyle = colours.rule;
      pen.lineWidth = 1;
      pen.textAlign = "center";
      for (let ns = Math.ceil(from / step) * step; ns <= to; ns += step) {
        const x = Math.round(xOf(ns)) + .5;
        pen.beginPath();
        pen.moveTo(x, AXIS - 5);
        pen.lineTo(x, chart.height);
        pen.stroke();
        if (x > GUTTER + 20 && x < width - 30) pen.fillText(formatNs(ns, to, step), x, 14);
      }
    }

    // Spans thinner than a pixel share it: the more of it they cover, the stronger its colour.
    function flush(faint, y) {
      if (faint.pixel < 0) return;
      pen.globalAlpha = Math.min(1, Math.max(.12, faint.covered));
      pen.fillStyle = faint.fill;
      pen.fillRect(faint.pixel, y + 2, 1, ROW - 4);
      pen.globalAlpha = 1;
    }

    function drawRow(row, colours) {
      let drawn = 0, faint = { pixel: -1, covered: 0, fill: "" };
      for (let i = firstEndingAfter(row.end, from); i < row.op.length && row.start[i] < to; i++) {
        const left = Math.max(GUTTER, xOf(row.start[i])), right = Math.min(width, xOf(row.end[i]));
        const op = row.table[row.op[i]], pixel = Math.floor(left), length = right - left;
        const fill = op[1] ? colours.communication : colours.compute;
        drawn++;
        if (length < 1) {
          if (pixel !== faint.pixel) {
            flush(faint, row.y);
            faint = { pixel, covered: 0, fill };
          }
          faint.covered += length;
          continue;
        }
        pen.fillStyle = fill;
        pen.fillRect(left, row.y + 2, length > 3 ? length - 1 : length, ROW - 4);
        if (length > 46) {
          pen.fillStyle = op[1] ? "#10141a" : colours["on-compute"];
          pen.textAlign = "left";
          pen.fillText(fitted(op[0], length - 10), left + 5, row.y + ROW / 2 + 4);
        }
      }
      flush(faint, row.y);
      return drawn;
    }

    function fitted(name, room) {
      const most = Math.floor(room / 6.4);
      return name.length <= most ? name : `${name.slice(0, Math.max(1, most - 1))}…`;
    }

    function draw() {
      const colours = {};
      for (const name of ["compute", "communication", "on-compute", "text", "muted", "rule"]) colours[name] = colour(`--${name}`);
      pen.clearRect(0, 0, width, chart.height);
      pen.font = "11px system-ui, 'Liberation Sans', Arial, sans-serif";
      drawAxis(colours);
      let drawn = 0;
      for (const row of chart.rows) {
        if (row.heading !== undefined) continue;
        drawn += drawRow(row, colours);
      }
      pen.clearRect(0, AXIS, GUTTER, chart.height);
      for (const row of chart.rows) {
        pen.textAlign = "left";
        pen.fillStyle = row.heading === undefined ? colours.muted : colours.text;
        pen.fillText(fitted(row.heading ?? row.name, GUTTER - 16), row.heading === undefined ? 18 : 8, row.y + 15);
      }
      canvas.dataset.spansInView = String(drawn);
      canvas.dataset.tracks = String(chart.rows.filter((row) => row.heading === undefined).length);
      canvas.dataset.fromNs = String(Math.round(from));
      canvas.dataset.toNs = String(Math.round(to));
      const shown = `${formatNs(from, to, (to - from) / 1000)} to ${formatNs(to, to, (to - from) / 1000)} of ${formatNs(chart.stepNs, chart.stepNs)}`;
      byId("timeline-status").textContent = `${shown}, ${drawn} spans in view`;
    }

    function setView(newFrom, newTo) {
      const span = Math.min(chart.stepNs, Math.max(MIN_WINDOW_NS, newTo - newFrom));
      from = Math.min(Math.max(0, newFrom), chart.stepNs - span);
      to = from + span;
      tip.hidden = true;
      redraw();
    }

    function zoom(factor, centre) {
      setView(centre - (centre - from) * factor, centre + (to - centre) * factor);
    }

    function hit(x, y) {
      const row = chart.rows.find((r) => r.heading === undefined && y >= r.y && y < r.y + ROW);
      if (!row || x < GUTTER) return null;
      // A span thinner than a pixel is still found half a pixel away.
      const slack = (to - from) / (width - GUTTER), time = nsOf(x);
      const i = firstEndingAfter(row.end, time - slack);
      return i < row.op.length && row.start[i] <= time + slack ? { row, i } : null;
    }

    function showTip(event) {
      const area = canvas.getBoundingClientRect();
      const found = hit(event.clientX - area.left, event.clientY - area.top);
      tip.hidden = !found;
      if (!found) return;
      const { row, i } = found, op = row.table[row.op[i]];
      const start = row.start[i], end = row.end[i];
      tip.textContent = [
        op[0], chart.details[op[2]], `${formatNs(start, end, 1)} to ${formatNs(end, end, 1)}, ${formatNs(end - start, end - start, 1)} long`,
        `${row.rank}, ${row.name}, op ${op[3]}`,
      ].join("\n");
      const box = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, window.innerWidth - box.width - 8))}px`;
      tip.style.top = `${event.clientY + 18 + box.height > window.innerHeight ? event.clientY - box.height - 10 : event.clientY + 18}px`;
    }

    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const span = to - from;
      if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
        const move = (event.deltaX || event.deltaY) / (width - GUTTER) * span;
        setView(from + move, to + move);
      } else {
        const x = event.clientX - canvas.getBoundingClientRect().left;
        zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY / 300))), nsOf(Math.max(GUTTER, x)));
      }
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      drag = { x: event.clientX, from, to };
      canvas.classList.add("dragging");
      canvas.setPointerCapture?.(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!drag) return showTip(event);
      const move = (drag.x - event.clientX) / (width - GUTTER) * (drag.to - drag.from);
      return setView(drag.from + move, drag.to + move);
    });
    const endDrag = () => { drag = null; canvas.classList.remove("dragging"); };
    canvas.addEventListener("pointerup", endDrag);
    canvas.addEventListener("pointercancel", endDrag);
    canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
    canvas.addEventListener("keydown", (event) => {
      const step = (to - from) * .2, middle = (from + to) / 2;
      const act = {
        ArrowLeft: () => setView(from - step, to - step), ArrowRight: () => setView(from + step, to + step),
        "+": () => zoom(.6, middle), "=": () => zoom(.6, middle), "-": () => zoom(1 / .6, middle),
        0: () => setView(0, chart.stepNs), Escape: () => { tip.hidden = true; },
      }[event.key];
      if (act) { act(); event.preventDefault(); }
    });
    byId("zoom-in").addEventListener("click", () => zoom(.5, (from + to) / 2));
    byId("zoom-out").addEventListener("click", () => zoom(2, (from + to) / 2));
    byId("zoom-reset").addEventListener("click", () => setView(0, chart.stepNs));
    window.addEventListener("resize", () => { resize(); redraw(); });
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

    choose("timeline-choice", (index) => {
      chart = layOut(strategies[index]);
      canvas.dataset.strategy = chart.name;
      canvas.setAttribute("aria-label", `Timeline of ${chart.name}: ${strategies[index].summary}`);
      byId("timeline-note").textContent = strategies[index].note;
      from = 0;
      to = chart.stepNs;
      tip.hidden = true;
      resize();
      draw();
    });
  }

  choose("memory-choice", showMemory);
  const strategies = JSON.parse(byId("timeline-data").textContent);
  if (strategies.length) timeline(strategies);
  root.dataset.ready = "true";
})();
