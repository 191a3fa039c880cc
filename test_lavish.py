# SPDX-License-Identifier: MIT
"""Tests: python -m pytest. Offline, no GPU, no data; each checks against an oracle that is not the
code under test: torchvision, timm (skipped aloud if absent), a naive loop, or a count by hand.
"""
import inspect
import json
import math
import os
import re
import subprocess
import sys
import wave

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import data
import lavish
import train

HERE = os.path.dirname(os.path.abspath(__file__))


def randomise(module, seed=0):
    """Every parameter and batch-norm statistic away from its start, so that a slip would show."""
    generator = torch.Generator().manual_seed(seed)
    noise = lambda t: torch.randn(t.shape, generator=generator)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() < 2:
                parameter.copy_(0.5 + 0.2 * noise(parameter))
            else:
                parameter.copy_(noise(parameter) / parameter[0].numel() ** 0.5)
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.copy_(0.5 + 0.1 * noise(buffer).abs())
    return module


def tiny_swin():
    """Three stages 8, 4 and 2 wide under a window of 4: shifted, unshifted, shrunken."""
    return randomise(lavish.SwinV2(16, (2, 2, 2), (2, 2, 4), 4, 32)).eval()


def tiny_net(**settings):
    settings = {"latents": 3, "reduction": 4, **settings}
    net = lavish.Lavish(tiny_swin(), **settings)
    randomise(net.adapters, 1)
    return net


def images(count, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 3, size, size, generator=generator),
            torch.randn(count, size, size, generator=generator))


# ---------------------------------------------------------------- fbank


def naive_fbank(sound, size, shift):
    """Log-mel energies by the textbook, one window at a time, in double precision."""
    bins = np.arange(257) * 16000 / 512
    mel = lambda f: 1127 * np.log(1 + f / 700)
    edges = np.linspace(mel(20), mel(8000), size + 2)
    up = (mel(bins)[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - mel(bins)[:, None]) / (edges[2:] - edges[1:-1])
    filters = np.clip(np.minimum(up, down), 0, None)
    filters[256] = 0  # Kaldi leaves out the Nyquist bin
    window, rows = np.hanning(400), []
    for start in range(0, 16000 - 400 + 1, shift):
        x = sound[start:start + 400] - sound[start:start + 400].mean()
        x = x - 0.97 * np.concatenate([x[:1], x[:-1]])  # Kaldi's pre-emphasis
        power = abs(np.fft.rfft(x * window, 512)) ** 2
        rows.append(np.log(np.maximum(power @ filters, np.finfo(np.float32).eps)))
    return np.array(rows)


@pytest.mark.parametrize("size, shift", [(192, 83), (48, 332)])
def test_fbank_is_the_textbook_log_mel_then_zero_rows(size, shift):
    sound = np.random.default_rng(0).standard_normal(16000) * 0.1
    image = lavish.fbank(torch.tensor(sound, dtype=torch.float32), size, mean=-3.0, std=2.0).numpy()
    wanted = (naive_fbank(sound, size, shift) + 3) / 4
    assert image.shape == (size, size)
    assert len(wanted) == {192: 188, 48: 47}[size]
    assert abs(image[:len(wanted)] - wanted).max() < 2e-3
    assert (image[len(wanted):] == 0).all()


def test_fbank_of_silence_is_not_the_padding():
    image = lavish.fbank(torch.zeros(16000))
    assert torch.allclose(image[:188], torch.tensor((-15.9424 - lavish.AVE_MEAN) / 2 / lavish.AVE_STD))
    with pytest.raises(ValueError, match="one second"):
        lavish.fbank(torch.zeros(15999))


# ---------------------------------------------------------------- Swin-V2


@pytest.mark.parametrize("name, oracle", [("tiny", "swin_v2_t"), ("small", "swin_v2_s"),
                                          ("base", "swin_v2_b")])
def test_swin_equals_torchvision(name, oracle):
    theirs = randomise(getattr(torchvision.models, oracle)(weights=None)).eval()
    ours = lavish.swin_v2(name).eval()
    lavish.load_swin_weights(ours, theirs.state_dict())
    x = images(1, 256)[0]
    with torch.no_grad():
        wanted = theirs.norm(theirs.features(x)).flatten(1, 2)
        assert (ours(x)[-1] - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())
    missing, extra = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing and all(k.startswith("head") or "relative" in k for k in extra)


def naive_attention(attn, x):
    """Cosine window attention token by token: who may look at whom, said without roll or mask."""
    side, w, s, heads = attn.side, attn.window, attn.shift, attn.heads
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias * attn.bias_mask).chunk(3, -1)
    split = lambda t: t.view(len(x), side * side, heads, -1)
    q, k, v = F.normalize(split(q), dim=-1), F.normalize(split(k), dim=-1), split(v)
    scale = attn.logit_scale.clamp(max=math.log(100)).exp().flatten()
    out = torch.zeros_like(v)
    # Shifted windows start s rows before the map, so that the border windows are cut short.
    window_of = lambda i: ((i // side + (w - s if s else 0)) // w, (i % side + (w - s if s else 0)) // w)
    for i in range(side * side):
        seen = [j for j in range(side * side) if window_of(j) == window_of(i)]
        offset = torch.tensor([[i // side - j // side, i % side - j % side] for j in seen]).float()
        offset = offset / (w - 1) * 8
        offset = offset.sign() * torch.log2(1 + offset.abs()) / math.log2(8)
        bias = 16 * torch.sigmoid(attn.cpb_mlp(offset))                        # (seen, heads)
        scores = (q[:, i, None] * k[:, seen]).sum(-1) * scale + bias           # (B, seen, heads)
        out[:, i] = (scores.softmax(1)[..., None] * v[:, seen]).sum(1)
    return attn.proj(out.flatten(2))


@pytest.mark.parametrize("side, window, shift", [(8, 4, 0), (8, 4, 2), (12, 6, 3), (3, 3, 0)])
@torch.no_grad()
def test_window_attention_equals_a_loop_over_tokens(side, window, shift):
    attn = randomise(lavish.WindowAttention(8, 2, side, window, shift, window))
    x = torch.randn(2, side * side, 8)
    assert (attn(x) - naive_attention(attn, x)).abs().max() < 1e-5


def test_swin_equals_timm_where_windows_shrink():
    timm = pytest.importorskip("timm", reason="timm is an oracle for tests alone: pip install timm")
    theirs = timm.create_model("swinv2_tiny_window8_256", img_size=64, num_classes=0)
    theirs = randomise(theirs).eval()
    ours = lavish.swin_v2("tiny", 64).eval()
    for attn in (m for m in ours.modules() if isinstance(m, lavish.WindowAttention)):
        attn.offsets = lavish.log_offsets(attn.window, attn.window)  # timm was told no pretraining
    lavish.load_swin_weights(ours, theirs.state_dict())
    x = images(2, 64)[0]
    with torch.no_grad():
        wanted = theirs.forward_features(x).flatten(1, 2)
        assert (ours(x)[-1] - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())


def microsoft_names(state):
    """Our names -> those of Microsoft's checkpoints, by hand, for a backbone of three stages."""
    out = {}
    for key, tensor in state.items():
        part = key.split(".")
        if key.startswith("features.0"):
            key = f"patch_embed.{'proj' if part[2] == '0' else 'norm'}.{part[3]}"
        elif part[0] == "features" and int(part[1]) % 2:
            key = f"layers.{int(part[1]) // 2}.blocks." + ".".join(part[2:])
        elif part[0] == "features":
            key = f"layers.{int(part[1]) // 2 - 1}.downsample." + ".".join(part[2:])
        key = key.replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2").replace("cpb_mlp.fc1", "cpb_mlp.0")
        if key.endswith("qkv.bias"):
            q, _, v = tensor.chunk(3)
            out[key.replace("qkv.bias", "q_bias")], out[key.replace("qkv.bias", "v_bias")] = q, v
        else:
            out[key] = tensor
    out["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    out["head.weight"] = torch.zeros(5, 64)
    return {"model": out}


def test_microsoft_checkpoint_loads_from_a_path_with_a_space(tmp_path, monkeypatch):
    swin = tiny_swin()
    monkeypatch.setitem(lavish.SWIN_V2, "test", (16, (2, 2, 2), (2, 2, 4), 4, 32, None))
    path = tmp_path / "swin v2.pth"
    torch.save(microsoft_names(swin.state_dict()), path)
    loaded = lavish.swin_v2("test", weights=str(path)).eval()
    x = images(2)[0]
    assert torch.equal(loaded(x)[-1], swin(x)[-1])


@pytest.mark.parametrize("damage, fault", [
    (lambda s: s.pop("norm.weight"), "missing norm.weight"),
    (lambda s: s.update(more=torch.zeros(1)), "extra more"),
    (lambda s: s.update({"norm.bias": torch.zeros(3)}), r"norm.bias is \(3,\), not \(64,\)")])
def test_weights_that_do_not_fit_are_named(damage, fault):
    state = tiny_swin().state_dict()
    damage(state)
    with pytest.raises(lavish.InputError, match=fault):
        lavish.load_swin_weights(tiny_swin(), state)


def test_position_bias_is_kept_when_frozen_and_trainable_when_not():
    swin, x = tiny_swin(), images(1)[0]
    attn = swin.stages[0][0][1].attn
    swin(x)[-1].sum().backward()
    assert attn.cpb_mlp[0].weight.grad.abs().sum() > 0
    swin.requires_grad_(False)
    swin(x)
    kept = attn.bias()
    assert attn.bias() is kept
    attn.load_state_dict(randomise(lavish.WindowAttention(16, 2, 8, 4, 2, 4), 5).state_dict())
    assert not torch.equal(attn.bias(), kept)


def test_image_sizes_that_do_not_divide_are_refused_with_those_that_do():
    with pytest.raises(lavish.InputError, match=r"192.*windows of 8.*64, 128, 256"):
        lavish.swin_v2("tiny", 192)
    with pytest.raises(lavish.InputError, match="unknown backbone 'huge'.*nano, tiny"):
        lavish.swin_v2("huge")
    assert [t.shape[1:] for t in lavish.swin_v2("nano")(images(1, 48)[0])] == [(144, 32), (36, 64), (9, 128)]
    with torch.device("meta"):
        windows = [blocks[0].attn.window for blocks, _ in lavish.swin_v2("large").stages]
    assert windows == [12, 12, 12, 6]


# ---------------------------------------------------------------- the adapter


def naive_adapter(a, x, y, training):
    """The equations of the paper, token by token; a is the adapter's state."""
    m, groups = len(a["latents"]), a["down.weight"].shape[0] // (a["up.weight"].shape[1])
    norm = lambda t, name: (t - t.mean()) / (t.var(unbiased=False) + 1e-5).sqrt() * a[name + ".weight"] + a[name + ".bias"]
    fused = torch.empty_like(x)
    for b in range(len(x)):
        S = [L + sum(w * t for w, t in zip(torch.stack([L @ t for t in y[b]]).softmax(0), y[b]))
             for L in a["latents"]]
        for n in range(x.shape[1]):
            weights = torch.stack([x[b, n] @ s for s in S]).softmax(0)
            fused[b, n] = x[b, n] + a["gate_av"] * sum(weights[k] * S[k] for k in range(m))
    def convolve(rows, weight):  # 1 x 1 and grouped: each group of outputs sees its own inputs
        out = rows.new_zeros(len(rows), len(weight))
        for o in range(len(weight)):
            group = o * groups // len(weight)
            inputs = rows[:, group * weight.shape[1]:(group + 1) * weight.shape[1]]
            out[:, o] = inputs @ weight[o, :, 0]
        return out
    def batch_norm(rows, name):
        mean, var = (rows.mean(0), rows.var(0, unbiased=False)) if training else (
            a[name + ".running_mean"], a[name + ".running_var"])
        return (rows - mean) / (var + 1e-5).sqrt() * a[name + ".weight"] + a[name + ".bias"]
    rows = torch.stack([norm(t, "norm_in") for t in fused.flatten(0, 1)])
    rows = batch_norm(convolve(rows, a["down.weight"]), "bn_down").clamp(min=0)
    rows = batch_norm(convolve(rows, a["up.weight"]), "bn_up")
    rows = torch.stack([a["gate"] * norm(t, "norm_out") for t in rows])
    return rows.view(x.shape)


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_adapter_equals_the_equations(training):
    adapter = randomise(lavish.LavishAdapter(12, latents=3, reduction=2, groups=3)).train(training)
    state = {k: v.clone() for k, v in adapter.state_dict().items()}
    state["up.weight"] = adapter.up.weight  # (12, 2, 1): six hidden channels in three groups
    x, y = torch.randn(2, 5, 12), torch.randn(2, 4, 12)
    assert (adapter(x, y) - naive_adapter(state, x, y, training)).abs().max() < 1e-5


def test_adapter_stands_alone_in_sixty_lines():
    source = inspect.getsource(lavish.LavishAdapter)
    assert source.count("\n") <= 60
    scope = {}
    exec("import torch, torch.nn as nn, torch.nn.functional as F\n" + source, scope)
    adapter = scope["LavishAdapter"](32)
    assert adapter(torch.randn(2, 9, 32), torch.randn(2, 4, 32)).shape == (2, 9, 32)
    with pytest.raises(ValueError, match="dim 20 must be a multiple of reduction 8 x groups 2"):
        scope["LavishAdapter"](20)


def spread_of_latents(zeros):
    torch.manual_seed(0)
    adapter = lavish.LavishAdapter(16, latents=4, reduction=2)
    nn.init.ones_(adapter.gate_av)
    if zeros:
        nn.init.zeros_(adapter.latents)
    x, y, target = torch.randn(3, 2, 9, 16)
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.mse_loss(adapter(x, y), target).backward()
        optimizer.step()
    return adapter.latents.std(0).max().item(), adapter.latents.abs().max().item()


def test_random_latents_differ_after_training_and_zero_ones_never_part():
    assert spread_of_latents(zeros=False)[0] > 0.1
    spread, size = spread_of_latents(zeros=True)
    assert size > 0.05 and spread < 1e-5  # they move, but all together


# ---------------------------------------------------------------- two streams


@torch.no_grad()
def test_closed_gates_leave_the_frozen_backbone():
    net = tiny_net().eval()
    for module in net.modules():
        if isinstance(module, lavish.LavishAdapter):
            nn.init.zeros_(module.gate)
    frames, spectrograms = images(2)
    visual, audio = net(frames, spectrograms)
    for ours, frozen in zip(visual, net.backbone(frames)):
        assert torch.allclose(ours, frozen, atol=1e-6)
    for ours, frozen in zip(audio, net.backbone(spectrograms[:, None].expand(-1, 3, -1, -1))):
        assert torch.allclose(ours, frozen, atol=1e-6)


@torch.no_grad()
def test_both_updates_are_made_from_tokens_neither_has_changed():
    net = tiny_net().eval()
    frames, spectrograms = images(2)
    v, a = net.backbone.embed(frames), net.backbone.embed(spectrograms[:, None].expand(-1, 3, -1, -1))
    adapters, wanted = iter(net.adapters), []
    for blocks, merge in net.backbone.stages:
        for block in blocks:
            for branch, adapter in zip(block.branches(), next(adapters)):
                v, a = (v + branch(v) + adapter["visual"](v, a), a + branch(a) + adapter["audio"](a, v))
        wanted.append((v, a))
        v, a = merge(v), merge(a)
    wanted[-1] = net.backbone.norm(v), net.backbone.norm(a)
    for ours, theirs in zip(zip(*net(frames, spectrograms)), wanted):
        for x, y in zip(ours, theirs):
            assert torch.allclose(x, y, atol=2e-5)


def test_gradients_reach_adapters_and_head_only():
    model = lavish.AVE(tiny_net(), classes=4).train()
    frames, spectrograms = images(6)
    before = {k: v.clone() for k, v in model.net.backbone.state_dict().items()}
    optimizer = torch.optim.Adam(train.trainable(model), 1e-2)
    logits = model(frames.unflatten(0, (2, 3)), spectrograms.unflatten(0, (2, 3)))
    assert logits.shape == (2, 3, 4)
    logits.square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("net.backbone"), name
    assert all(torch.equal(before[k], v) for k, v in model.net.backbone.state_dict().items())
    assert not any(module.training for module in model.net.backbone.modules())


@pytest.mark.parametrize("modality, out, kept", [("v", "audio", "visual"), ("a", "visual", "audio")])
def test_one_modality_leaves_the_other_out(modality, out, kept):
    model = lavish.AVE(tiny_net(modality=modality), classes=4).eval()
    names = [name for name, _ in model.named_parameters()]
    assert any(kept in n for n in names) and not any(out in n or "latents" in n for n in names)
    assert model.head[0].in_features == 64
    (f1, s1), (f2, s2) = images(2), images(2, seed=1)
    answer = lambda f, s: model(f[None], s[None])
    changed = (f2, s1) if modality == "a" else (f1, s2)
    assert torch.equal(answer(f1, s1), answer(*changed))
    assert not torch.equal(answer(f1, s1), answer(f2, s2))


def test_drop_path_acts_in_training_alone():
    frames, spectrograms = images(2)
    outputs = []
    for drop_path in (0.0, 0.9):
        net = tiny_net(drop_path=drop_path)
        with torch.no_grad():
            torch.manual_seed(0)
            outputs += [net.eval()(frames, spectrograms)[0][-1], net.train()(frames, spectrograms)[0][-1]]
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[1], outputs[3])


def test_trained_state_dict_is_small_and_complete():
    model = lavish.AVE(tiny_net(), classes=4).train()
    state = lavish.trained_state_dict(model)
    assert not any("backbone" in key for key in state)
    assert "net.adapters.0.0.visual.bn_up.running_mean" in state
    other = lavish.AVE(lavish.Lavish(tiny_swin(), 3, 4), classes=4)
    lavish.load_trained_state_dict(other, state)
    frames, spectrograms = images(2)
    answer = lambda m: m.eval()(frames[None], spectrograms[None])
    assert torch.equal(answer(model), answer(other))
    with pytest.raises(lavish.InputError, match=r"another configuration.*latents is \(3, 16\), not \(2, 16\)"):
        lavish.load_trained_state_dict(lavish.AVE(lavish.Lavish(tiny_swin(), 2, 4), 4), state)


def test_freeze_all_but_adapters():
    model = nn.ModuleDict({"vit": nn.Linear(16, 16), "adapter": lavish.LavishAdapter(16)})
    lavish.freeze_all_but_adapters(model)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"adapter"}


def test_parameter_counts_are_the_papers():
    with torch.device("meta"):
        model = lavish.AVE(lavish.Lavish(lavish.swin_v2("large")))
    trainable, total = lavish.count_parameters(model)
    head = 21841 * 1536 + 21841
    assert (round(trainable / 1e6, 2), round((total + head) / 1e6, 2)) == (10.04, 238.83)
    size = sum(t.numel() * 4 for t in lavish.trained_state_dict(model).values())
    assert 38e6 < size < 45e6


# ---------------------------------------------------------------- segmentation


@pytest.mark.parametrize("training", [False, True])
def test_tpavi_equals_the_quadratic_form(training):
    tpavi = randomise(lavish.TPAVI(8, 6)).double().train(training)
    x, audio = torch.randn(6, 8, 4, 5).double(), torch.randn(2, 3, 6).double()
    video = x.view(2, 3, 8, 20).transpose(2, 3).reshape(2, 60, 8)              # (B,T*H*W,C)
    sound = tpavi.align(audio).repeat_interleave(20, 1)                        # (B,T*H*W,C)
    weights = tpavi.theta(video) @ tpavi.phi(sound).transpose(1, 2) / 60       # every pair of pixels
    y = tpavi.out(weights @ tpavi.g(video)).flatten(0, 1)
    expected = F.batch_norm(y, tpavi.bn.running_mean.clone(), tpavi.bn.running_var.clone(),
                            tpavi.bn.weight, tpavi.bn.bias, training)
    wanted = tpavi.norm(video.flatten(0, 1) + expected).view(6, 4, 5, 8).permute(0, 3, 1, 2)
    assert (tpavi(x, audio) - wanted).abs().max() < 1e-12


def tiny_avs(modality="av", mask_size=20):
    torch.manual_seed(0)
    return lavish.AVS(tiny_net(modality=modality), mask_size, 8, (4, 6, 8), (6, 4))


@pytest.mark.parametrize("mask_size", [20, 33])
def test_masks_of_any_size_and_the_first_one_alone(mask_size):
    model = randomise_head(tiny_avs(mask_size=mask_size)).eval()
    frames, spectrograms = (x.unflatten(0, (2, 3)) for x in images(6))
    masks = model(frames, spectrograms)
    assert masks.shape == (2, 3, mask_size, mask_size)
    assert torch.allclose(model(frames, spectrograms, first=True), masks[:, :1], atol=1e-4)
    swapped = model(frames, spectrograms.flip(0))
    assert (swapped - masks).abs().max() > 1e-3  # what is heard matters
    mute = tiny_avs("v").eval()
    assert torch.equal(mute(frames, spectrograms), mute(frames, spectrograms.flip(0)))
    assert not any("tpavi" in name or "audio" in name for name, _ in mute.named_parameters())
    with pytest.raises(lavish.InputError, match="no sound-only variant"):
        tiny_avs("a")


def randomise_head(model):
    for name in ("tpavi", "dilated", "mask"):
        randomise(getattr(model, name), 2)
    return model


def test_every_part_of_the_mask_decoder_learns():
    model = tiny_avs().train()
    frames, spectrograms = (x.unflatten(0, (2, 3)) for x in images(6))
    for tpavi in model.tpavi:
        nn.init.ones_(tpavi.bn.weight)
    model(frames, spectrograms, first=True).square().sum().backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("net.backbone")
        assert frozen or parameter.grad is not None, name


def naive_f_score(probabilities, masks):
    """AVSBench's definition, threshold by threshold, over the whole split."""
    total, frames = np.zeros(255), 0
    for p, m in zip(probabilities.numpy(), masks.numpy()):
        if m.sum():
            frames += 1
            for k, threshold in enumerate(np.linspace(0, 1 - 1e-10, 255, dtype=np.float32)):
                found = p >= threshold
                precision, recall = (found * m).sum() / (found.sum() + 1e-20), (found * m).sum() / m.sum()
                total[k] += 0 if precision + recall == 0 else 1.3 * precision * recall / (0.3 * precision + recall)
    return total.max() / frames


def test_mask_scores_by_their_definitions():
    torch.manual_seed(0)
    logits, masks = torch.randn(5, 12, 12) * 2, (torch.rand(5, 12, 12) > 0.7).float()
    masks[2] = 0
    found = logits.sigmoid() > 0.5
    wanted = [(found[k] & (masks[k] > 0)).sum() / ((found[k] | (masks[k] > 0)).sum() + 1e-7) for k in range(5)]
    wanted[2] = 1 - found[2].float().mean()  # nothing sounds: the share left empty
    assert torch.allclose(train.mask_iou(logits, masks), torch.stack(wanted), atol=1e-6)
    score = train.FScore()
    for batch in (slice(0, 2), slice(2, 5)):
        score.update(logits[batch], masks[batch])
    assert abs(score.compute() - naive_f_score(logits.sigmoid(), masks)) < 1e-5


@pytest.fixture
def avs_root(tmp_path):
    """One clip per split in AVSBench's layout; the mask is the left half."""
    root = tmp_path / "AVS data"
    rows = ["name,start,category,split"] + [f"-{split} 1,0,tabla,{split}" for split in ("train", "val", "test")]
    for split in ("train", "val", "test"):
        for kind in ("visual_frames", "gt_masks"):
            folder = root / "s4_data" / kind / split / "tabla" / f"-{split} 1"
            folder.mkdir(parents=True)
            for k in range(1, 6 if kind == "visual_frames" or split != "train" else 2):
                picture = torch.full((3, 24, 24), 40 * k, dtype=torch.uint8)
                if kind == "gt_masks":
                    picture[:, :, :12], picture[:, :, 12:] = 255, 0
                torchvision.io.write_png(picture, str(folder / f"-{split} 1_{k}.png"))
        (root / "s4_data/audio_wav" / split / "tabla").mkdir(parents=True)
        pcm(root / f"s4_data/audio_wav/{split}/tabla/-{split} 1.wav", np.full((80000, 2), 0.1), 2, 16000)
    (root / "s4_meta_data.csv").write_text("\n".join(rows))
    return root


@pytest.mark.parametrize("stored, on", [((0, 1), True), ((0, 255), True), ((60, 200), True), ((0, 0), False)])
def test_masks_however_they_are_stored(avs_root, stored, on):
    path = avs_root / "s4_data/gt_masks/test/tabla/-test 1/-test 1_2.png"
    grey = torch.full((1, 24, 24), stored[0], dtype=torch.uint8)
    grey[:, :, :12] = stored[1]
    torchvision.io.write_png(grey, str(path))
    frames, spectrograms, masks = data.AVSBench(str(avs_root), "test", 48)[0]
    assert frames.shape == (5, 3, 48, 48) and spectrograms.shape == (5, 48, 48) and masks.shape == (5, 24, 24)
    assert (masks[1, :, :12] == on).all() and (masks[1, :, 12:] == 0).all()
    assert data.AVSBench(str(avs_root), "train", 48)[0][2].shape == (1, 24, 24)


@pytest.mark.parametrize("header", ["name,start time,category,split", "split,category,name,x", None, "id,t,class,set"])
def test_meta_data_by_names_or_places(avs_root, header):
    path = avs_root / "s4_meta_data.csv"
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    if header and header.startswith("split"):
        rows = [[split, category, name, "0"] for name, _, category, split in rows]
    path.write_text("\n".join([header] * bool(header) + [",".join(row) for row in rows]))
    assert data.AVSBench(str(avs_root), "val", 48).clips == [("-val 1", "tabla")]


def test_three_seconds_of_sound_are_padded_and_counted(avs_root):
    wav = avs_root / "s4_data/audio_wav/test/tabla/-test 1.wav"
    pcm(wav, np.full((48000, 1), 0.1), 2, 16000)
    dataset = data.AVSBench(str(avs_root), "test", 48)
    assert data.check_files(dataset) == [str(wav)]
    assert torch.equal(dataset[0][1][4], lavish.fbank(torch.zeros(16000), 48))


# ---------------------------------------------------------------- wav, jpg, AVE's layout


def pcm(path, samples, width, rate, extensible=False):
    """Write (N, channels) floats as PCM of `width` bytes."""
    if width == 1:
        raw = np.round(samples * 127 + 128).astype(np.uint8).tobytes()
    else:
        raw = np.round(samples * (2 ** (8 * width - 1) - 1)).astype("<i4")
        raw = raw.reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setparams((samples.shape[1], width, rate, 0, "NONE", ""))
        file.writeframes(raw)
    if extensible:  # what ffmpeg writes for 24 bit and for more than two channels
        old = path.read_bytes()
        fmt = bytearray(old[20:36]) + b"\x16\0" + b"\x18\0\0\0\0\0" + b"\x01\0" + b"\0" * 14
        fmt[:2] = b"\xfe\xff"
        path.write_bytes(old[:16] + len(fmt).to_bytes(4, "little") + fmt + old[36:])


@pytest.mark.parametrize("width, rate, channels, extensible", [
    (1, 16000, 1, False), (2, 44100, 2, False), (2, 8000, 1, False), (3, 48000, 6, True),
    (4, 16000, 2, False)])
def test_read_wav(tmp_path, width, rate, channels, extensible):
    path = tmp_path / "a sound.wav"
    t = np.arange(2 * rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * t)
    samples = np.zeros((len(t), channels))
    samples[:, -1] = tone  # in the last channel alone: the left one is silent
    pcm(path, samples, width, rate, extensible)
    sound = data.read_wav(str(path))
    wanted = 0.5 / channels * np.sin(2 * np.pi * 440 * np.arange(32000) / 16000)
    assert sound.dtype == torch.float32 and sound.shape == (32000,)
    middle = slice(1000, -1000)  # the resampler rings at the ends
    assert abs(sound.numpy()[middle] - wanted[middle]).max() < (0.01 if width == 1 else 1e-3)


def test_seconds_are_cut_on_the_second_and_end_in_silence():
    seconds = data.seconds_of(torch.arange(40000.0), 4)
    assert seconds[:, 0].tolist() == [0, 16000, 32000, 0] and seconds[2, 8000] == 0


@pytest.fixture
def ave_root(tmp_path):
    """Two clips in AVE's layout, one with a dash, names of 3 and 8 digits, 3 and 1 frames/s."""
    root = tmp_path / "AVE data"
    rows = ["Church bell&-a b.c&good&2&4", "Frying (food)&x_1&good&0&10", "Church bell&none&good&0&0"]
    (root / "raw_audio").mkdir(parents=True)
    for video, rate, digits in (("-a b.c", 3, 3), ("x_1", 1, 8)):
        (root / "video_frames" / video).mkdir(parents=True)
        for k in range(10 * rate):
            image = torch.full((3, 20, 30), 10 + 200 * (k // rate) // 9, dtype=torch.uint8)
            torchvision.io.write_jpeg(image, str(root / "video_frames" / video / f"{k:0{digits}d}.jpg"))
        pcm(root / "raw_audio" / f"{video}.wav", np.random.default_rng(0).uniform(-1, 1, (160000, 1)), 2, 16000)
    write = lambda name, lines: (root / name).write_text("\n".join(lines) + "\n")
    write("Annotations.txt", ["Category&VideoID&Quality&StartTime&EndTime", *rows])
    write("trainSet.txt", rows)
    write("valSet.txt", rows[1:2])
    write("testSet.txt", rows[:2])
    return root


def test_ave_items(ave_root):
    dataset = data.AVE(str(ave_root), "test", 48)
    assert dataset.categories == ["Church bell", "Frying (food)"] and data.check_files(dataset) == []
    frames, spectrograms, labels = dataset[0]
    assert frames.shape == (10, 3, 48, 48) and spectrograms.shape == (10, 48, 48)
    assert labels.tolist() == [2, 2, 0, 0, 2, 2, 2, 2, 2, 2] and dataset[1][2].tolist() == [1] * 10
    grey = frames[:, 0, 0, 0] * data.IMAGENET_STD[0] + data.IMAGENET_MEAN[0]
    wanted = torch.tensor([(10 + 200 * t // 9) / 255 for t in range(10)])
    assert (grey - wanted).abs().max() < 0.02  # a frame out of each second
    sound = data.read_wav(str(ave_root / "raw_audio" / "-a b.c.wav"))
    assert torch.equal(spectrograms[3], lavish.fbank(sound[48000:64000], 48))
    assert data.AVE(str(ave_root), "train", 48).labels(2).tolist() == [2] * 10  # start = end = 0


def test_annotations_without_a_header(ave_root):
    path = ave_root / "Annotations.txt"
    path.write_text("\n".join(path.read_text().splitlines()[1:]))
    assert data.AVE(str(ave_root), "train", 48).categories == ["Church bell", "Frying (food)"]


def test_a_short_sound_is_counted_and_padded(ave_root):
    pcm(ave_root / "raw_audio" / "x_1.wav", np.full((160, 1), 0.5), 2, 16000)  # 10 ms
    dataset = data.AVE(str(ave_root), "test", 48)
    assert data.check_files(dataset) == [str(ave_root / "raw_audio" / "x_1.wav")]
    silence = lavish.fbank(torch.zeros(16000), 48)
    assert torch.equal(dataset[1][1][5], silence) and dataset[1][1].isfinite().all()


# ---------------------------------------------------------------- the toy and the command line


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small toy AVE and a random nano in the place of the pretrained one."""
    folder = tmp_path_factory.mktemp("toy data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.TOY_CLIPS, "ave", {"train": 6, "val": 3, "test": 3})
        data.make_toy("ave", str(folder / "ave"))
    torch.manual_seed(0)
    torch.save(lavish.swin_v2("nano").state_dict(), folder / "nano.pt")
    return folder


def test_toy_clips_need_both_senses(toy):
    for split, clips in (("train", 6), ("val", 3), ("test", 3)):
        dataset = data.AVE(str(toy / "ave"), split, 48)
        assert len(dataset) == clips and data.check_files(dataset) == []
    frames, spectrograms, _ = data.AVE(str(toy / "ave"), "train", 48)[0]
    assert frames.isfinite().all() and abs(spectrograms.mean()) < 1 and 0.2 < spectrograms.std() < 1
    dataset = data.AVE(str(toy / "ave"), "train", 48)
    events = torch.cat([dataset.labels(i) for i in range(6)]) < len(dataset.categories)
    assert 0.3 <= events.float().mean() <= 0.7


def test_toy_is_the_same_for_the_same_seed(tmp_path, monkeypatch):
    monkeypatch.setitem(data.TOY_CLIPS, "ave", {"train": 1, "val": 1, "test": 1})
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        data.make_toy("ave", str(tmp_path / name), seed)
    read = lambda name: [p.read_bytes() for p in sorted((tmp_path / name).rglob("*.*")) if p.suffix != ".json"]
    assert read("a") == read("b") != read("c")
    with pytest.raises(lavish.InputError, match="is there already"):
        data.make_toy("ave", str(tmp_path / "a"))


def test_timbres_and_looks_differ():
    rng = np.random.default_rng(0)
    sounds = torch.stack([lavish.fbank(torch.tensor(0.1 * data.play(name, 1, rng)).float(), 48)
                          for name in data.INSTRUMENTS]).mean(1)
    assert torch.cdist(sounds, sounds).add(torch.eye(6) * 9).min() > 0.5
    looks = [draw_alone(data.INSTRUMENTS[name]) for name in data.INSTRUMENTS]
    assert len({look.tobytes() for look in looks}) == 6


def draw_alone(look):
    shape, colour = look
    image, (mask,) = data.draw([(shape, data.COLOURS[colour], 0.5, 0.5, 0.3)], 48, np.random.default_rng(0))
    assert 0.05 < mask.float().mean() < 0.4 and image[:, mask].float().mean() > 80
    return image.numpy()


def run(arguments, monkeypatch, folder):
    monkeypatch.chdir(folder)
    train.main(arguments)


def test_train_ave_writes_what_it_promises(toy, tmp_path, monkeypatch, capsys):
    arguments = ["ave", "--data", str(toy / "ave"), "--epochs", "2", "--batch-size", "3"]
    for out in ("first run", "again"):
        run([*arguments, "--out", out], monkeypatch, tmp_path)
    text = capsys.readouterr().out
    assert "if all were called background" in text and max(map(len, text.split("\n"))) <= 80
    first, again = (json.loads((tmp_path / out / "result.json").read_text()) for out in ("first run", "again"))
    assert {"task", "modality", "metric", "test", "seconds", "seed", "trainable_parameters",
            "total_parameters", "settings", "versions"} <= set(first)
    assert first["test"] == again["test"] and 0 <= first["test"] <= 1
    log = [json.loads(line) for line in (tmp_path / "first run" / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2] and log[1]["loss"] < log[0]["loss"]
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["adapters.pt", "log.jsonl", "result.json"]
    saved = torch.load(tmp_path / "again" / "adapters.pt", weights_only=True)
    assert saved["settings"]["epochs"] == 2 and not any("backbone" in key for key in saved["trained"])


def test_every_option_is_read(toy, tmp_path, monkeypatch):
    """Each option changes the settings in force, and the ones that shape the net change the net."""
    base = ["ave", "--data", str(toy / "ave")]
    plain = vars(train.parse(base))
    for option, value in {"backbone": "tiny", "weights": "none", "image_size": 96, "latents": 5,
                          "reduction": 4, "groups": 4, "lr": 0.5, "head_lr": 0.5, "batch_size": 7,
                          "epochs": 3, "modality": "v", "drop_path": 0.5, "seed": 4, "device": "meta",
                          "workers": 1, "out": "x"}.items():
        changed = vars(train.parse([*base, "--" + option.replace("_", "-"), str(value)]))
        assert changed[option] == value != plain[option]
        source = inspect.getsource(train)
        assert f"args.{option}" in source, f"--{option} is read nowhere"
    count = lambda *more: lavish.count_parameters(train.build_net(train.parse([*base, *more])))[0]
    assert len({count(), count("--latents", "5"), count("--reduction", "4"), count("--groups", "4"),
                count("--modality", "v"), count("--reduction", "4", "--groups", "4")}) == 6


def test_real_data_gets_the_supplementarys_numbers(ave_root):
    args = train.parse(["ave", "--data", str(ave_root)])
    assert (args.backbone, args.image_size, args.latents, args.reduction, args.groups, args.batch_size,
            args.lr, args.head_lr) == ("large", 192, 2, 8, 2, 2, 5e-6, 4e-6)


def test_nano_is_pretrained_once(tmp_path, capsys):
    path = train.pretrain_nano(str(tmp_path / "nano.pt"), "cpu", steps=3, batch=4)
    assert lavish.swin_v2("nano", weights=path).norm.weight.shape == (128,)
    written = os.path.getmtime(path)
    assert train.pretrain_nano(path, "cpu") == path and os.path.getmtime(path) == written


def corrupt(name, content=b"\0\1\2"):
    return lambda root: (root / name).write_bytes(content)


def zero_frames(root):
    for path in (root / "video_frames" / "x_1").iterdir():
        path.unlink()


@pytest.mark.parametrize("damage, options, fault", [
    (lambda r: r.rename(r.parent / "gone"), (), "no data folder .*AVE data; make a toy one: python data.py"),
    (lambda r: (r / "valSet.txt").unlink(), (), "no .*valSet.txt"),
    (zero_frames, (), "1 of 2 clips lack files, first .*x_1/0001.jpg; for each: ffmpeg"),
    (lambda r: (r / "raw_audio" / "x_1.wav").unlink(), (), "1 of 2 clips lack .* first .*x_1.wav"),
    (corrupt("raw_audio/x_1.wav", b""), (), "x_1.wav is not a PCM wav .*ends too early.*convert"),
    (corrupt("raw_audio/x_1.wav", b"RIFFnonsense"), (), "x_1.wav is not a PCM wav"),
    (corrupt("video_frames/x_1/00000000.jpg"), (), "00000000.jpg is not a readable image"),
    (corrupt("video_frames/x_1/00000000.jpg"), ("--workers", "1"), "00000000.jpg is not a readable image"),
    (lambda r: (r / "video_frames/x_1/00000000.jpg").rename(r / "video_frames/x_1/frame.jpg"), (),
     "x_1 holds frames that are not numbered"),
    (corrupt("trainSet.txt", b"Whale&x_1&good&0&10\n"), (), "trainSet.txt, line 1: 'Whale&x_1.*category of Annot"),
    (corrupt("trainSet.txt", b"Church bell,x_1\n"), (), "trainSet.txt, line 1"),
    (lambda r: None, ("--backbone", "huge"), "unknown backbone 'huge'"),
    (lambda r: None, ("--image-size", "50"), "image size 50 does not divide"),
    (lambda r: None, ("--reduction", "7"), "--reduction and --groups do not fit nano: dim 32"),
    (lambda r: None, ("--weights", "missing.pth"), "no weights at missing.pth"),
    (corrupt("w.pth"), ("--weights", "w.pth"), "w.pth is not a checkpoint"),
    (lambda r: torch.save(tiny_swin().state_dict(), r / "w.pth"), ("--weights", "w.pth"),
     r"do not fit this backbone: .*features.0.0.weight is \(16, 3, 4, 4\), not \(32"),
])
def test_bad_input_ends_in_one_line(ave_root, monkeypatch, capsys, damage, options, fault):
    rows = ave_root / "trainSet.txt"
    rows.write_text("\n".join(rows.read_text().splitlines()[:2]))
    damage(ave_root)
    monkeypatch.chdir(ave_root if ave_root.exists() else ave_root.parent)
    settings = ["--backbone", "nano", "--weights", "none", "--image-size", "48", "--workers", "0",
                "--out", "run", "--epochs", "1", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        train.main(["ave", "--data", str(ave_root), *settings, *options])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in error and error.startswith("train.py: "), error
    assert re.search(fault, error), error
    assert not os.path.exists("run/adapters.pt") and not os.path.exists("run/result.json")


def test_no_network_says_what_to_download_and_where(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(
        __import__("urllib.error", fromlist=["URLError"]).URLError("no route")))
    with pytest.raises(lavish.InputError, match="swinv2_large_patch4_window12_192_22k.pth elsewhere and put it into "
                                                + str(tmp_path)):
        lavish.swin_v2("large", weights="imagenet")


def test_commands_run_as_a_person_types_them(toy, tmp_path):
    def python(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=HERE, capture_output=True, text=True)
    table = python("lavish.py")
    assert table.returncode == 0 and "10.04   10.1   238.83  238.8" in table.stdout
    stats = python("data.py", "stats", "ave", str(toy / "ave"), "--size", "64")
    assert stats.returncode == 0 and "kept in" in stats.stdout
    assert set(json.loads((toy / "ave" / "fbank.json").read_text())) == {"48", "64"}
    missing = python("data.py", "stats", "ave", str(tmp_path / "nothing"))
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
