"""ESRT's transformer as its neighbour's file has it: counts, what a token sees, memory, search."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import esrt
from common import count


def size(module):
    return sum(p.numel() for p in module.parameters())


def test_counts():
    block = esrt.EfficientTransformer(32)
    attention = block.attention
    assert (size(block), size(attention)) == (188_424, 145_440)
    assert (attention.heads, attention.scale) == (8, 1 / 6)
    assert [tuple(layer.weight.shape) for layer in (attention.reduce, attention.qkv,
                                                    attention.out)] == [
        (144, 288), (432, 144), (288, 144)]
    assert attention.reduce.bias is attention.qkv.bias is None
    assert size(esrt.EfficientTransformer(24)) == 106_326
    assert size(esrt.AttentionOperation(24)) == 106_326


def test_multiply_adds_of_the_block():
    class Alone(torch.nn.Module):
        def __init__(self, c, **options):
            super().__init__()
            self.c, self.block = c, esrt.EfficientTransformer(c, **options)

        def forward(self, x):
            return self.block(x.new_empty(1, self.c, *x.shape[2:]))

    macs = count(Alone(24), 1, (24, 24))[1]
    assert macs == 576 * (104_976 + 31_104)
    assert macs // (576 * 9 * 24 * 24) == 26  # times conv3x3
    assert count(Alone(24), 1, (48, 72))[1] == 6 * macs  # in tiles, cost is linear
    d, N = 288, 48 * 48
    assert count(Alone(32, tile=48), 1, (48, 48))[1] == N * (9 * d * d // 4 + d * N // 4)
    assert count(Alone(32, tile=48, parts=1), 1, (48, 48))[1] == N * (9 * d * d // 4 + d * N)


def test_one_token_changes_its_segment_alone():
    torch.manual_seed(0)
    tokens = torch.rand(1, 8, 8, 288)
    other = tokens.clone()
    other[0, 0, 3] += 1
    for parts, changed in (4, range(16)), (1, range(64)):
        attention = esrt.Attention(288, 8, parts=parts)
        with torch.no_grad():
            difference = (attention(tokens) - attention(other)).abs().sum(-1).flatten()
        assert difference.nonzero().flatten().tolist() == list(changed)


def test_what_is_left_over_is_a_fifth_segment():
    attention = esrt.Attention(72, 2)  # 5x7 tokens: 8, 8, 8, 8, 3
    tokens = torch.rand(1, 5, 7, 72)
    other = tokens.clone()
    other[0, 4, 6] += 1
    with torch.no_grad():
        difference = (attention(tokens) - attention(other)).abs().sum(-1).flatten()
    assert difference.nonzero().flatten().tolist() == [32, 33, 34]
    assert attention.extra_multiply_adds(tokens) == 72 * (4 * 64 + 9)
    assert attention(tokens[:, :1, :2]).shape == (1, 1, 2, 72)  # fewer tokens than segments


def test_periodic_tokens_cannot_tell_split_from_undivided():
    torch.manual_seed(0)
    split, undivided = (esrt.Attention(288, 8, parts=parts) for parts in (4, 1))
    undivided.load_state_dict(split.state_dict())
    tokens = torch.rand(2, 16, 288).repeat(1, 4, 1).view(2, 8, 8, 288)
    with torch.no_grad():
        assert (split(tokens) - undivided(tokens)).abs().max() < 5e-7
        other = torch.rand(2, 8, 8, 288)
        assert (split(other) - undivided(other)).abs().max() > 1e-4


def test_tiles_do_not_see_one_another():
    torch.manual_seed(0)
    attention = esrt.Attention(72, 2, tile=4)
    tokens = torch.rand(2, 6, 9, 72)
    with torch.no_grad():
        whole = attention(tokens)
        for rows in (slice(0, 4), slice(4, 6)):
            for columns in (slice(0, 4), slice(4, 8), slice(8, 9)):
                torch.testing.assert_close(attention(tokens[:, rows, columns]),
                                           whole[:, rows, columns])


def test_attention_by_hand():
    """One segment of one head against torch's own attention."""
    torch.manual_seed(0)
    attention = esrt.Attention(288, 8)
    tokens = torch.rand(1, 8, 8, 288)
    with torch.no_grad():
        q, k, v = attention.qkv(attention.reduce(tokens)).view(64, 3, 8, 18).unbind(1)
        mixed = [F.scaled_dot_product_attention(*(x[i:i + 16].transpose(0, 1)[None]
                                                  for x in (q, k, v)), scale=1 / 6)
                 for i in range(0, 64, 16)]
        wanted = attention.out(torch.cat(mixed, 2)[0].transpose(0, 1).reshape(64, 144))
        torch.testing.assert_close(attention(tokens).view(64, 288), wanted)


def test_fold_sums_and_the_operation_divides():
    block, operation = esrt.EfficientTransformer(8), esrt.AttentionOperation(8)
    for each in block, operation.block:  # nothing but unfold and fold is left
        torch.nn.init.zeros_(each.attention.out.weight)
        torch.nn.init.zeros_(each.attention.out.bias)
        torch.nn.init.zeros_(each.mlp[2].weight)
        torch.nn.init.zeros_(each.mlp[2].bias)
    x = torch.randn(1, 8, 5, 6)
    places = torch.full((5, 6), 9.0)
    places[[0, -1]] = places[:, [0, -1]] = 6
    places[[0, 0, -1, -1], [0, -1, 0, -1]] = 4
    with torch.no_grad():
        torch.testing.assert_close(block(x), places * x)
        torch.testing.assert_close(operation(x), x.relu())


@pytest.mark.parametrize("side, attention, block", [(24, 2.60, 2.11), (48, 3.46, 3.11)])
def test_memory(side, attention, block):
    saved = esrt.memory_saved(32, side)
    assert saved["matrices"] == 4
    assert (round(saved["attention"], 2), round(saved["block"], 2)) == (attention, block)
    N = side * side
    for parts, matrices in (4, 8 * N * N), (1, 32 * N * N):
        module = esrt.Attention(288, 8, side, parts)
        assert esrt.kept_for_backward(module, torch.rand(1, side, side, 288)) == (
            matrices, 4032 * N + matrices)


def test_derived_network_is_the_supernet_at_progress_1():
    assert tuple(esrt.CANDIDATES) == ("skip1x1", "conv3x3", "residual", "dws", "attention")
    assert esrt.SPACE_SIZE == 625
    torch.manual_seed(0)
    net = esrt.Supernet(3)
    torch.nn.init.normal_(net.tail.conv.weight, std=0.1)  # born near zero
    torch.nn.init.normal_(net.alpha)
    net.alpha.data[0, 1, 4] = 9
    with torch.no_grad():
        alpha = net.weights(1.0)
        found = net.derive(alpha)
        network = net.inherit(found)
        x = torch.rand(1, 3, 25, 26)
        assert found[0][1] == ("attention",)
        assert (network(x) - net(x, alpha)).abs().max() < 1e-5
    assert net.cost(alpha).item() == esrt.multiply_adds(found, 3)  # an attention among them
    everywhere = ((("attention",),) * 2,) * 2
    assert net.dearest.item() == esrt.multiply_adds(everywhere, 3)


def test_dead_operations_are_not_computed():
    net = esrt.Supernet(2)
    called = []
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.ModuleDict):
            for each, operation in module.items():
                operation.register_forward_hook(lambda *_, each=each: called.append(each))
    with torch.no_grad():
        alpha = net.weights(1.0)
        net(torch.rand(1, 3, 8, 8), alpha)
    assert called == [name for cell in net.derive(alpha) for (name,) in cell]


def test_command_line(tmp_path):
    esrt.main(["--steps", "5", "--search", "3", "--batch", "2", "--patch", "12",
               "--out", str(tmp_path / "run")])
    assert {"architecture.json", "network.pt", "history.csv", "distributions.npz", "results.json",
            "results.md", "settings.json"} == {f.name for f in (tmp_path / "run").iterdir()}
    found = json.loads((tmp_path / "run/architecture.json").read_text())["operations"]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert all(name in esrt.CANDIDATES for cell in found for (name,) in cell)
    assert results["kept"] is True and abs(results["lost"]) < 1e-3
    assert results["memory"]["matrices"] == 4
    assert np.load(tmp_path / "run/distributions.npz")["alpha"].shape == (3, 2, 2, 5)
    history = (tmp_path / "run/history.csv").read_text().splitlines()
    assert history[0] == "step,loss,live_operations,attention,cost"
    assert [row.split(",")[0] for row in history[1:]] == ["1", "2", "3", "4", "5"]


def test_mistakes_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        esrt.main(["--price", "-1", "--out", str(tmp_path / "run")])
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1 and "a price" in lines[0]
