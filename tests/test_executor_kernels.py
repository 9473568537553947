"""Each kernel against torch's own function and its autograd, in fp64, and shards of it against the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F

from rtp_sim.executor import fused_attention, loss
from rtp_sim.executor.kernels import KERNELS
from rtp_sim.executor.launch import Columns, Launch, Result, Route
from rtp_sim.executor.optimizer import Hyper, new_state, update
from rtp_sim.executor.packing import packed, put, shard, unpacked
from rtp_sim.executor.parcels import STATISTICS
from rtp_sim.model.kernels import BACKWARD
from rtp_sim.model.kernels import KERNELS as PRICED
from rtp_sim.model.layers import (
    Activation,
    Attention,
    Call,
    Conv2d,
    CrossEntropy,
    Dropout,
    Embedding,
    Experts,
    Extent,
    LayerOp,
    Linear,
    MaxPool2d,
    Mlp,
    Norm,
    Positions,
    Router,
    Split,
)
from rtp_sim.model.training import TrainingSpec

Params = Mapping[str, torch.Tensor]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def params_of(op: LayerOp, split: Split = Split()) -> dict[str, torch.Tensor]:  # noqa: B008
    return {p.name: random(*p.shape, seed=i) for i, p in enumerate(op.params(split))}


def values(result: Result) -> torch.Tensor:
    return result.values if isinstance(result, Columns) else result


def forward_and_backward(
    op: LayerOp,
    extent: Extent,
    x: list[torch.Tensor],
    w: Params,
    dy: torch.Tensor,
    split: Split = Split(),  # noqa: B008
) -> tuple[torch.Tensor, dict[int, torch.Tensor], dict[str, torch.Tensor]]:
    """All kernels of a layer by hand, no schedule: output, input gradients, parameter gradients."""
    lowered, route = op.lower(extent, split), dict[str, Route]()
    tensors = {f"x{i}": t.reshape(-1) for i, t in enumerate(x)}

    def launch(call: Call, gradient: torch.Tensor | None = None) -> Launch:
        ins = {i: tensors[n] for i, n in enumerate(call.inputs) if n in tensors}
        outs = {i: tensors[n] for i, n in enumerate(call.outputs) if n in tensors}
        wanted = tuple(range(len(call.inputs)))
        return Launch(op, call, split, dict(call.dims), extent, ins, outs, w, gradient, wanted, route=route)

    saved: list[dict[str, torch.Tensor]] = []
    for call in lowered.calls:
        saved.append(dict(tensors))
        made = KERNELS[call.kernel](launch(call))
        tensors.update({n: values(r).reshape(-1) for n, r in zip(call.outputs, made.outputs, strict=True)})
    y, grads = tensors["y"], {"y": dy.reshape(-1)}
    dw: dict[str, torch.Tensor] = {}
    for call, before in zip(reversed(lowered.calls), reversed(saved), strict=True):
        gradient = grads.pop(call.outputs[0])
        if call.inputs != call.outputs:
            tensors.update(before)
        for rule in BACKWARD.get(call.kernel, ()):
            made = KERNELS[rule.kernel](launch(call, gradient))
            for i, r in made.dx.items():
                name, flat = call.inputs[i], values(r).reshape(-1)
                grads[name] = grads[name] + flat if name in grads else flat
            dw.update(made.dw)
    return y, {int(n[1:]): g for n, g in grads.items() if n[0] == "x"}, dw


def check(op: LayerOp, extent: Extent, x: list[torch.Tensor], function: Callable[..., torch.Tensor]) -> None:
    """The layer's kernels against `function(*x, **parameters)` and its autograd."""
    w = params_of(op)
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in x]
    wl = {n: t.clone().requires_grad_() for n, t in w.items()}
    expected = function(*leaves, **wl)
    dy = random(expected.numel(), seed=5)
    expected.backward(dy.view(expected.shape))
    y, dx, dw = forward_and_backward(op, extent, x, w, dy)
    assert torch.allclose(y, expected.detach().reshape(-1), atol=1e-12)
    for i, leaf in enumerate(leaves):
        if leaf.requires_grad:
            assert torch.allclose(dx[i], leaf.grad.reshape(-1), atol=1e-12), f"dx{i}"
    for name, leaf in wl.items():
        assert torch.allclose(dw[name].reshape(leaf.shape), leaf.grad, atol=1e-12), f"d{name}"


B, S, H = 2, 5, 6
TOKENS = Extent(B, S)


@pytest.mark.parametrize("function", ["gelu", "silu", "relu"])
def test_activations(function: str) -> None:
    check(Activation(function, H), TOKENS, [random(B * S, H)], getattr(F, function))


def test_gated_activation() -> None:
    def swiglu(x: torch.Tensor) -> torch.Tensor:
        return F.silu(x[:, :H]) * x[:, H:]

    check(Activation("gated", H), TOKENS, [random(B * S, 2 * H)], swiglu)


def test_linear() -> None:
    check(Linear(H, 7), TOKENS, [random(B * S, H)], lambda x, weight, bias: F.linear(x, weight, bias))
    check(Linear(H, 7, bias=False), TOKENS, [random(B * S, H)], lambda x, weight: F.linear(x, weight))


def test_norms() -> None:
    x = [3 * random(B * S, H) + 1]
    check(Norm("layernorm", H), TOKENS, x, lambda x, weight, bias: F.layer_norm(x, (H,), weight, bias, 1e-5))
    check(Norm("rmsnorm", H), TOKENS, x, lambda x, weight: F.rms_norm(x, (H,), weight, 1e-5))


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 1)])
def test_convolution(stride: int, padding: int) -> None:
    op = Conv2d(2, 3, 3, 7, 6, stride, padding)
    x = [random(B, 2, 7, 6)]
    check(op, Extent(B, 1), x, lambda x, weight, bias: F.conv2d(x, weight, bias, stride, padding))


def test_pooling_of_a_size_the_window_does_not_divide() -> None:
    check(MaxPool2d(3, 7, 6, 2), Extent(B, 1), [random(B, 3, 7, 6)], lambda x: F.max_pool2d(x, 2))


def test_embedding_and_positions() -> None:
    ids = torch.tensor([3, 0, 3, 8, 1, 2, 3, 3, 0, 7])
    check(Embedding(9, H), TOKENS, [ids], lambda ids, weight: F.embedding(ids, weight))
    x = random(B * S, H)
    w, dy = params_of(Positions(8, H)), random(B * S, H, seed=1)
    op, call = Positions(8, H), Positions(8, H).lower(TOKENS).calls[0]
    launch = Launch(op, call, Split(), dict(call.dims), TOKENS, {0: x.reshape(-1)}, {}, w, dy.reshape(-1))
    (y,) = KERNELS["positions"](launch).outputs
    assert torch.equal(values(y), x + w["weight"][:S].repeat(B, 1))
    expected = torch.cat([dy.view(B, S, H).sum(0), torch.zeros(3, H, dtype=torch.float64)])
    assert torch.allclose(KERNELS["positions.wgrad"](launch).dw["weight"], expected, atol=1e-14)


def attention(op: Attention, x: torch.Tensor, **w: torch.Tensor) -> torch.Tensor:
    d = op.head_dim
    qkv = F.linear(x, w["qkv"], w.get("qkv_bias")).view(B, S, op.heads + 2 * op.kv_heads, d).transpose(1, 2)
    q, k, v = qkv[:, : op.heads], qkv[:, op.heads : op.heads + op.kv_heads], qkv[:, op.heads + op.kv_heads :]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=op.causal, enable_gqa=True)
    return F.linear(y.transpose(1, 2).reshape(B * S, -1), w["out"], w.get("out_bias"))


@pytest.mark.parametrize("implementation", ["flash", "materialised"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_attention(implementation: str, causal: bool, heads: int, kv_heads: int) -> None:
    op = Attention(H, heads, kv_heads, 4, causal=causal, implementation=implementation)
    check(op, TOKENS, [random(B * S, H)], lambda x, **w: attention(op, x, **w))


def test_attention_without_a_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_attention, "kind_of", lambda q: "")
    test_attention("flash", True, 4, 2)


def test_a_fused_kernel_that_does_not_do_what_it_should_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random(1, 1, 4, 4)
    assert fused_attention.kind_of(q) == "cpu"
    right = fused_attention.backward
    monkeypatch.setattr(fused_attention, "backward", lambda *a: tuple(2 * g for g in right(*a)))
    fused_attention.works.cache_clear()
    assert fused_attention.kind_of(q) == ""
    monkeypatch.undo()
    fused_attention.works.cache_clear()


def test_rotary_attention_knows_relative_positions_only() -> None:
    """Turning by position: lengths stay, and the products of a query and a key depend on their distance alone."""
    op = Attention(8, 1, 1, 8, qkv_bias=False, out_bias=False, rotary=True)
    call = next(c for c in op.lower(TOKENS).calls if c.kernel == "rope")
    same = random(1, 24).repeat(B * S, 1)
    launch = Launch(op, call, Split(), dict(call.dims), TOKENS, {0: same.reshape(-1)}, {}, {})
    (y,) = KERNELS["rope"](launch).outputs
    turned = values(y).view(B, S, 3, 8)
    assert torch.allclose(turned[:, :, 2], same.view(B, S, 3, 8)[:, :, 2])
    assert torch.allclose(turned.norm(dim=3), same.view(B, S, 3, 8).norm(dim=3))
    products = turned[0, :, 0] @ turned[0, :, 1].T
    for distance in range(-S + 1, S):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(products[0], products[0, :1].expand(S))
    back = KERNELS["rope.bwd"](Launch(op, call, Split(), dict(call.dims), TOKENS, {}, {}, {}, values(y).reshape(-1)))
    assert torch.allclose(values(back.dx[0]).reshape(-1), same.reshape(-1))


def test_the_first_rotary_angle_by_hand() -> None:
    """Head dimension 2, position 1: a turn by 1 radian."""
    op = Attention(2, 1, 1, 2, qkv_bias=False, out_bias=False, rotary=True)
    call, extent = op.lower(Extent(1, 2)).calls[1], Extent(1, 2)
    qkv = torch.tensor([1.0, 0, 1, 0, 5, 6]).repeat(2).double()
    (y,) = KERNELS["rope"](Launch(op, call, Split(), dict(call.dims), extent, {0: qkv}, {}, {})).outputs
    cos, sin = 0.5403023058681398, 0.8414709848078965
    assert values(y).flatten()[6:].tolist() == pytest.approx([cos, sin, cos, sin, 5, 6], abs=1e-15)


def test_mlps() -> None:
    def plain(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, up_bias: torch.Tensor, down_bias: torch.Tensor):
        return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)

    def gated(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor):
        gate, rest = F.linear(x, up).chunk(2, 1)
        return F.linear(F.silu(gate) * rest, down)

    check(Mlp(H, 7), TOKENS, [random(B * S, H)], plain)
    check(Mlp(H, 7, "silu", True, False), TOKENS, [random(B * S, H)], gated)


def experts_by_hand(x: torch.Tensor, logits: torch.Tensor, op: Experts, w: Params) -> torch.Tensor:
    """Token by token, expert by expert."""
    rows = []
    for token, row in zip(x, logits, strict=True):
        chosen = row.topk(op.top_k)
        weight = chosen.values.softmax(0)
        y = torch.zeros_like(token)
        for i, e in enumerate(chosen.indices.tolist()):
            hidden = F.gelu(w["up"][e] @ token + w["up_bias"][e])
            y = y + weight[i] * (w["down"][e] @ hidden + w["down_bias"][e])
        rows.append(y)
    return torch.stack(rows)


def test_router_and_experts() -> None:
    op, router = Experts(H, 3, 4, 2, "gelu", False, True), Router(H, 4, 2)
    x, gate, w = random(B * S, H), random(4, H), params_of(op)
    xs, gs = x.clone().requires_grad_(), gate.clone().requires_grad_()
    ws = {n: t.clone().requires_grad_() for n, t in w.items()}
    expected = experts_by_hand(xs, xs @ gs.T, op, ws)
    dy = random(B * S, H, seed=3)
    expected.backward(dy)
    routing, _, _ = forward_and_backward(router, TOKENS, [x], {"weight": gate}, torch.zeros(B * S * 2 * 3))
    y, dx, dw = forward_and_backward(op, TOKENS, [x, routing], w, dy)
    _, dx_router, dw_router = forward_and_backward(router, TOKENS, [x], {"weight": gate}, dx[1])
    assert torch.allclose(y, expected.detach().reshape(-1), atol=1e-12)
    assert torch.allclose(dx[0] + dx_router[0], xs.grad.reshape(-1), atol=1e-12)
    assert torch.allclose(dw_router["weight"], gs.grad, atol=1e-12)
    for name, leaf in ws.items():
        assert torch.allclose(dw[name], leaf.grad, atol=1e-12), name


def test_an_expert_that_no_token_chooses_has_no_gradient() -> None:
    op, router = Experts(2, 3, 3, 1), Router(2, 3, 1)
    x, gate = torch.tensor([[1.0, 0], [2, 0]]).double(), torch.tensor([[1.0, 0], [0, 0], [-1, 0]]).double()
    routing, _, _ = forward_and_backward(router, Extent(1, 2), [x], {"weight": gate}, torch.zeros(6))
    assert routing.view(2, 3)[:, :2].tolist() == [[1, 0], [1, 0]]
    _, _, dw = forward_and_backward(op, Extent(1, 2), [x, routing], params_of(op), random(2, 2))
    assert dw["down"][0].abs().min() > 0
    assert dw["up"][1:].abs().max() == 0


# ---- loss


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, split: Split, scale: float = 1.0) -> Launch:
    op, extent = CrossEntropy(9), Extent(1, len(targets))
    call = op.lower(extent, split).calls[0]
    return Launch(op, call, split, dict(call.dims), extent, {0: logits.reshape(-1), 1: targets}, {}, {},
                  gradient_scale=scale)  # fmt: skip


def test_cross_entropy() -> None:
    logits, targets = 4 * random(7, 9), torch.tensor([0, 8, 3, 3, 1, 7, 2])
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, targets)
    (expected / 4).backward()
    launch = cross_entropy(logits, targets, Split(), 0.25)
    y, log_probs = (values(r) for r in KERNELS["cross_entropy"](launch).outputs)
    assert abs(float(y) - float(expected.detach())) < 1e-14
    back = Launch(launch.op, launch.call, Split(), launch.dims, launch.extent, {1: targets}, {1: log_probs.reshape(-1)},
                  {}, gradient_scale=0.25)  # fmt: skip
    assert torch.allclose(values(KERNELS["cross_entropy.bwd"](back).dx[0]), leaf.grad, atol=1e-15)


@pytest.mark.parametrize("n", [2, 4, 11])
def test_cross_entropy_of_logits_split_by_vocabulary(n: int) -> None:
    """Also over more ranks than columns; logits far apart, so that a wrong maximum would overflow or vanish."""
    logits, targets = 300 * random(7, 9), torch.tensor([0, 8, 3, 3, 1, 7, 2])
    leaf = logits.clone().requires_grad_()
    F.cross_entropy(leaf, targets).backward()
    launches, saved, rows = [], [], []
    for i in range(n):
        split = Split("vocab", n, i)
        mine = shard(Linear(1, 9, False, True), "weight", logits.T, split).T.contiguous()
        launches.append(cross_entropy(mine, targets, split))
        _, kept, statistics = (values(r) for r in KERNELS["cross_entropy"](launches[-1]).outputs)
        saved.append(kept)
        rows.append(statistics.clone())
    maximum = torch.stack([r[0] for r in rows]).amax(0)
    for r, kept in zip(rows, saved, strict=True):
        r[STATISTICS["max"]] = maximum
        loss.rebased(r, kept.reshape(-1))
    for row in (STATISTICS["sum"], STATISTICS["target"]):
        total = torch.stack([r[row] for r in rows]).sum(0)
        for r in rows:
            r[row] = total
    assert abs(float(loss.mean_loss(rows[0])) - float(F.cross_entropy(logits, targets))) < 1e-12
    parts = []
    for launch, kept, r in zip(launches, saved, rows, strict=True):
        y = {1: kept.reshape(-1), 2: r.reshape(-1)}
        back = Launch(launch.op, launch.call, launch.split, launch.dims, launch.extent, {1: targets}, y, {})
        parts.append(values(KERNELS["cross_entropy.bwd"](back).dx[0]))
    assert torch.allclose(torch.cat(parts, 1), leaf.grad, atol=1e-14)


# ---- dropout


def test_dropout() -> None:
    op = Dropout(1000)
    call, x = op.lower(Extent(1, 10)).calls[0], torch.ones(10_000).double()

    def run(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        made = KERNELS["dropout"](Launch(op, call, Split(), dict(call.dims), Extent(1, 10), {0: x}, {}, {}, seed=seed,
                                         dropout=0.2))  # fmt: skip
        return values(made.outputs[0]), values(made.outputs[1])

    (y, mask), (again, _), (other, _) = run(1), run(1), run(2)
    assert torch.equal(y, again)
    assert not torch.equal(y, other)
    assert set(y.tolist()) == {0.0, 1.25}
    assert mask.dtype is torch.uint8
    # Of 10,000 draws at 0.8 the standard deviation is 40.
    assert abs(int(mask.sum()) - 8000) < 200
    back = Launch(op, call, Split(), dict(call.dims), Extent(1, 10), {}, {1: mask}, {}, x, dropout=0.2)
    assert torch.equal(values(KERNELS["dropout.bwd"](back).dx[0]), y)


# ---- shards


SHARDED: list[tuple[LayerOp, str, int]] = [
    (Linear(6, 7), "out", 3), (Linear(6, 7), "in", 4), (Linear(6, 7, vocab=True), "vocab", 9),
    (Attention(6, 6, 3, 4, rotary=True), "heads", 2), (Attention(6, 4, 4, 4), "heads", 5),
    (Mlp(6, 7), "ffn", 3), (Mlp(6, 7, "silu", True, False), "ffn", 3), (Embedding(9, 6), "vocab", 4),
    (Embedding(9, 6), "width", 4), (Conv2d(6, 5, 3, 4, 5), "out", 3),
]  # fmt: skip


@pytest.mark.parametrize(("op", "kind", "n"), SHARDED)
def test_shards_add_up_or_lie_side_by_side(op: LayerOp, kind: str, n: int) -> None:
    """Uneven and empty shards included: outputs, input gradients and parameter gradients make the whole layer's. A bias
    on every shard counts once, and each copy gets all of its gradient."""
    extent = Extent(B, 1) if isinstance(op, Conv2d) else TOKENS
    ids = torch.tensor([3, 0, 3, 8, 1, 2, 3, 3, 0, 7])
    x = ids if isinstance(op, Embedding) else random(B, 6, 4, 5) if isinstance(op, Conv2d) else random(B * S, 6)
    w = params_of(op)
    y0 = op.lower(extent).tensors["y"].numel
    dy = random(y0, seed=8)
    whole_y, whole_dx, whole_dw = forward_and_backward(op, extent, [x], w, dy)
    y, dx = torch.zeros(y0).double(), torch.zeros_like(whole_dx.get(0, whole_y))
    full = {name: torch.zeros_like(t) for name, t in w.items()}
    rows = B if isinstance(op, Conv2d) else B * S
    for i in range(n):
        split = Split(kind, n, i)
        mine = unpacked(op, split, packed(op, split, w))
        lowered = op.lower(extent, split)
        route: dict[str, Route] = {}
        tensors = {"x0": x.reshape(-1)}
        for call in lowered.calls:
            before = dict(tensors)
            launch = Launch(op, call, split, dict(call.dims), extent, {0: tensors[call.inputs[0]]}, {}, mine,
                            route=route)  # fmt: skip
            for name, r in zip(call.outputs, KERNELS[call.kernel](launch).outputs, strict=True):
                if name == "y":
                    place(y, r, rows)
                else:
                    tensors[name] = values(r).reshape(-1)
            tensors.update({k: v for k, v in before.items() if call.inputs != call.outputs and k in call.inputs})
        grads: dict[str, torch.Tensor] = {"y": dy}
        flat = {p.name: torch.zeros(p.shape).double() for p in op.params(split)}
        for call in reversed(lowered.calls):
            for rule in BACKWARD.get(call.kernel, ()):
                ins = {j: tensors[name] for j, name in enumerate(call.inputs)}
                outs = {j: tensors[name] for j, name in enumerate(call.outputs) if name in tensors}
                made = KERNELS[rule.kernel](Launch(op, call, split, dict(call.dims), extent, ins, outs, mine,
                                                   grads[call.outputs[0]], (0,), route=route))  # fmt: skip
                for name, g in made.dw.items():
                    flat[name] += g.reshape(flat[name].shape)
                for r in made.dx.values():
                    if call.inputs[0] == "x0":
                        place(dx, r, rows)
                    else:
                        grads[call.inputs[0]] = values(r).reshape(-1)
        for name in ("bias", "out_bias", "down_bias"):
            if name in flat and flat[name].shape == w[name].shape and kind not in ("out", "vocab"):
                assert torch.allclose(flat[name], whole_dw[name], atol=1e-12)
        put(op, split, packed_flat(op, split, flat), full)
    assert torch.allclose(y, whole_y, atol=1e-12)
    assert torch.allclose(dx, whole_dx.get(0, dx), atol=1e-12)
    for name, expected in whole_dw.items():
        assert torch.allclose(full[name], expected.reshape(full[name].shape), atol=1e-12), name


def place(target: torch.Tensor, result: Result, rows: int) -> None:
    """Adds a shard's result to the columns it is for."""
    start = result.start if isinstance(result, Columns) else 0
    part = values(result).reshape(rows, -1)
    target.view(rows, -1)[:, start : start + part.shape[1]] += part


def packed_flat(op: LayerOp, split: Split, tensors: Params) -> torch.Tensor:
    return torch.cat([tensors[p.name].reshape(-1) for p in op.params(split)])


def test_a_shard_of_attention_by_hand() -> None:
    """4 query heads on 2 key/value heads of dimension 1: shard 1 has query rows 2, 3, key row 5, value row 7."""
    op = Attention(3, 4, 2, 1)
    full = torch.arange(8.0)[:, None] * torch.ones(3)
    assert shard(op, "qkv", full, Split("heads", 2, 1))[:, 0].tolist() == [2, 3, 5, 7]
    out = torch.arange(4.0) * torch.ones(3, 1)
    assert shard(op, "out", out, Split("heads", 2, 1))[0].tolist() == [2, 3]
    gated = torch.arange(10.0)[:, None]
    assert shard(Mlp(1, 5, "silu", True), "up", gated, Split("ffn", 2, 1))[:, 0].tolist() == [3, 4, 8, 9]


def test_every_priced_kernel_of_a_layer_has_one_that_computes() -> None:
    without_layer = {"copy", "zero", "optimizer", "grad_norm", "loss_scale"}
    # Habits of other frameworks, priced to predict their runs; ours has one kernel instead.
    forward = {"mul", "upcast", "log_softmax", "nll", "passes"}
    elsewhere = {"accumulate", *forward, *(f"{name}.bwd" for name in forward)}
    assert set(PRICED) - without_layer - elsewhere == set(KERNELS)
    assert not elsewhere & set(KERNELS)


# ---- optimizers


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd", "sgd-momentum"])
def test_optimizers_are_those_of_torch(kind: str) -> None:
    """Five steps on the same gradients."""
    hyper = Hyper(lr=0.1, weight_decay=0.05)
    mine, theirs = random(11), torch.nn.Parameter(random(11))
    rules: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": lambda p: torch.optim.Adam(p, lr=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.05),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }
    rule = rules[kind]([theirs])
    state = new_state(TrainingSpec(1, 1, precision="fp32", optimizer=kind), mine, torch.float64)
    for step in range(1, 6):
        g = random(11, seed=step)
        theirs.grad = g.clone()
        rule.step()
        update(kind, hyper, step, mine, g, state)
        assert torch.allclose(mine, theirs.detach(), atol=1e-14)


def test_master_weights_keep_what_bf16_would_lose() -> None:
    """Steps of 0.001 on a weight of 1: bf16 has 1/128 between its numbers there and would never move."""
    spec = TrainingSpec(1, 1, precision="bf16", optimizer="sgd")
    weights = torch.ones(1, dtype=torch.bfloat16)
    state = new_state(spec, torch.ones(1), None)
    assert state.size_bytes == spec.optimizer_bytes_per_parameter()
    for step in range(8):
        update("sgd", Hyper(lr=0.001), step + 1, weights, torch.ones(1, dtype=torch.bfloat16), state)
    assert float(state.master) == pytest.approx(0.992)
    assert float(weights) == 0.9921875
