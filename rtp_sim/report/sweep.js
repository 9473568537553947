// Shows the one chart of a sweep that the choices above it name. Choices: along what, what is drawn, and a value of every
// other axis; the axis that is drawn along has none.
"use strict";
(() => {
  const root = document.documentElement;
  const along = document.getElementById("sweep-along"), measure = document.getElementById("sweep-measure");
  const axes = [...document.querySelectorAll("[data-sweep-axis]")];
  const panels = [...document.querySelectorAll("[data-sweep-panel]")];
  if (!along) return;

  function show() {
    const chosen = along.selectedOptions[0].dataset.axis;
    const values = axes.map((select) => {
      const isAlong = select.dataset.sweepAxis === chosen;
      select.disabled = isAlong;
      return isAlong ? "*" : select.value;
    });
    const wanted = [along.value, measure.value, ...values].join(" ");
    for (const panel of panels) panel.hidden = panel.dataset.sweepPanel !== wanted;
    root.dataset.sweepShown = panels.filter((panel) => !panel.hidden).map((panel) => panel.dataset.sweepPanel).join(";");
  }

  for (const select of [along, measure, ...axes]) select.addEventListener("change", show);
  show();
})();
