# SPDX-License-Identifier: MIT
"""Tests: python -m pytest. Offline, no GPU, no data sets.

Each test checks one fact against an oracle that is not the code under test: torchvision, timm
(skipped aloud if absent), torch's own attention and convolution, a naive loop, a count by hand.

From top to bottom: small nets with random weights, the authors' way of computing, lavish.py; then
small data sets, data.py, training by recorded logits, the command line as a person types it."""

import argparse
import copy
import dataclasses
import inspect
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import wave
import zlib
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock, Mock, patch

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchaudio
import torchvision
from PIL import Image
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import data
import lavish
import train
from data import read_wav
from lavish import (
    AVE,
    AVQA,
    AVS,
    InputError,
    Lavish,
    LavishAdapter,
    OneStream,
    VideoMAE,
    ViT,
    fbank,
)

parametrize = pytest.mark.parametrize

# ---------------------------------------------------------------- small nets with random weights


def randomise(module, seed=0):
    """Move every parameter and batch-norm statistic away from its start, so that a slip shows.

    Matrices keep the scale of what they multiply; biases, norms and gates are of the order of 1.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 0.8)
    return module.double()


def tiny_swin(seed=0):
    """Stages 8, 4 and 2 tokens wide under a window of 4: shifted, unshifted, shrunken windows.

    Small enough to run in milliseconds, and with each case that the large one has.
    """
    return randomise(lavish.SwinV2(16, (2, 2, 2), (2, 2, 4), 4, 32), seed)


def tiny_vit(kind=ViT):
    """Two blocks on patches of 16 x 16 pixels: 4 in an image."""
    return randomise(kind(2, 2, 32, 32))


def tiny_lavish(latents=3, **settings):
    """The two streams on the tiny Swin, in evaluation mode. Their gates are open, so that what the
    adapters do shows in the tokens.
    """
    return randomise(Lavish(tiny_swin(), latents, reduction=4, **settings)).eval()


def images(*batch, size=32):
    """Noise for frames (*batch,3,S,S) and spectrograms (*batch,S,S).

    The same in each call, so that two nets can be given the same input.
    """
    torch.manual_seed(0)
    noise = torch.randn(*batch, 4, size, size).double()
    return noise[..., :3, :, :], noise[..., 3, :, :]


def tiny_model(task, **settings):
    """A task's model in training, and its inputs: two clips of three seconds.

    Without dropout, so that two ways of computing can be compared.
    """
    net = tiny_lavish(**settings)
    inputs = [*images(2, 3)]
    if task == "ave":
        model = randomise(AVE(net)).train()
    elif task == "avs":
        model = randomise(AVS(net, mask_size=20, channels=8, tpavi=True)).train()
    else:
        model = randomise(AVQA(net, hidden=8)).train()
        model.when_heard.eval()
        model.when_seen.eval()
        question = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 1]])
        negatives = inputs[0].flip(0)
        inputs += [question, negatives]
    return model, inputs


def gradients(model, outputs):
    """{name: gradient} of what the outputs depend on, under a loss that every output enters.

    In float32, because the heads' logits are: beyond its digits, gradients mean nothing.
    """
    model.zero_grad()
    sum(output.sin().sum() for output in outputs).backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- the authors' way of computing
# Slower, and word for word what the paper says: the oracle of the adapter, the two streams, TPAVI.
# `self` is the module of lavish.py whose forward a function stands for.


def attend(queries, tokens):
    """softmax(q t^T) t, by torch."""
    return F.scaled_dot_product_attention(queries, tokens, tokens, scale=1.0)


def convolve(linears, z):
    """The 1x1 convolution, in groups of channels, whose weights are those of the linear layers.

    So it was written by the authors, and so the paper says it: a grouped 1x1 convolution.
    """
    weight = torch.cat([linear.weight for linear in linears])
    return F.conv1d(z, weight[..., None], groups=len(linears))


def released_adapter(self, x, other):
    """LavishAdapter by torch's attention, and by convolutions along the tokens.

    Every operation is one of torch itself, and none is shared with ours.
    """
    latents = self.latents.expand(len(x), -1, -1)
    summary = latents + attend(latents, other)  # (BT,m,d)
    x = x + self.gate_av * attend(x, summary)  # (BT,N,d)
    z = self.norm_in(x).transpose(1, 2)  # (BT,d,N)
    z = self.bn_down(convolve(self.down, z)).relu()  # (BT,d/r,N)
    z = self.bn_up(convolve(self.up, z))  # (BT,d,N)
    return self.gate * self.norm_out(z.transpose(1, 2))


def released_block(backbone, block, lav_v, lav_a, x_v, x_a):
    """lavish_block of a Swin-V2 by the letter of Fig. 2: a pass of the frozen layers a stream."""
    y_v = x_v + block.norm1(block.attn(x_v)) + lav_v[0](x_v, x_a)
    y_a = x_a + block.norm1(block.attn(x_a)) + lav_a[0](x_a, x_v)
    z_v = y_v + block.norm2(block.mlp(y_v)) + lav_v[1](y_v, y_a)
    z_a = y_a + block.norm2(block.mlp(y_a)) + lav_a[1](y_a, y_v)
    return z_v, z_a


def released_tpavi(self, x, sound):
    """TPAVI.forward with the TP x TP weights of all pairs of a clip's pixels.

    Their number is the reason why lavish.py computes it in another order.
    """
    B, T, _ = sound.shape
    x = x.movedim(1, -1)  # (BT,H,W,C)
    pixels = x.reshape(B, -1, x.shape[-1])  # (B,TP,C)
    count = pixels.shape[1]  # TP
    phi = self.phi(self.align(sound)).repeat_interleave(count // T, 1)  # (B,TP,C/2)
    weights = self.theta(pixels) @ phi.transpose(1, 2) / count  # (B,TP,TP)
    y = self.out(weights @ self.g(pixels)).transpose(1, 2)  # (B,C,TP)
    z = self.norm(pixels + self.bn(y).transpose(1, 2))  # (B,TP,C)
    return z.view(x.shape).movedim(-1, 1)


@parametrize("task", ["ave", "avs", "avqa"])
def test_the_authors_way_of_computing_gives_the_same_outputs_and_gradients(task, monkeypatch):
    """What is computed faster in lavish.py is the same function.

    There each stream has a pass of its own, a group of channels is a linear layer, and TPAVI never
    forms its weights. Every trained parameter has a gradient.
    """
    model, inputs = tiny_model(task)
    ours = model(*inputs)
    our_gradients = gradients(model, ours)
    block = Mock(side_effect=released_block)
    model.net.run_block = block
    monkeypatch.setattr(LavishAdapter, "forward", released_adapter)
    monkeypatch.setattr(lavish.TPAVI, "forward", released_tpavi)
    theirs = model(*inputs)
    assert_close(ours, theirs)
    assert_close(our_gradients, gradients(model, theirs))
    assert block.called


# ---------------------------------------------------------------- the adapter


@parametrize("groups, training", [(1, True), (3, True), (3, False)])
def test_adapter_is_the_papers_equations(groups, training):
    """Torch's attention and grouped convolution give the same, in training and in evaluation.

    So one linear layer for each group of channels is the grouped 1x1 convolution.
    """
    adapter = randomise(LavishAdapter(12, 3, 2, groups)).train(training)
    x, other = torch.randn(2, 2, 5, 12).double()
    assert_close(adapter(x, other), released_adapter(adapter, x, other))


def test_adapter_stands_alone_in_sixty_lines():
    """Whoever wants the adapter alone copies its source.

    It runs where torch is imported and nothing else.
    """
    source = inspect.getsource(LavishAdapter)
    assert source.count("\n") <= 60
    scope = {"torch": torch, "nn": nn, "F": F}
    exec(source, scope)
    x = torch.randn(2, 9, 32)
    assert scope["LavishAdapter"](32)(x, x).shape == x.shape


def test_adapter_without_latents_ignores_the_other_stream():
    """latents=0 is late fusion: the streams meet in the head alone.

    It takes `other` all the same, so that one loop serves both kinds of adapters.
    """
    adapter = randomise(LavishAdapter(16, latents=0))
    x, other = torch.randn(2, 2, 9, 16).double()
    assert torch.equal(adapter(x, other), adapter(x))


def test_adapter_with_latents_wants_the_other_stream():
    """Silence about a missing stream would be late fusion without a word.

    Whoever copies the adapter learns of a forgotten argument at the first call.
    """
    with pytest.raises(ValueError, match="reads the other stream"):
        LavishAdapter(16)(torch.randn(2, 9, 16))


def test_reduction_times_groups_must_divide_the_width():
    """Each group of channels is reduced by itself.

    A remainder would leave channels out that no gradient ever reaches. That both divide it is not
    enough.
    """
    for dim, reduction, groups in ((20, 5, 3), (8, 4, 4)):
        fault = f"{dim} is no multiple of reduction {reduction} x groups {groups}"
        with pytest.raises(ValueError, match=fault):
            LavishAdapter(dim, reduction=reduction, groups=groups)


def test_equal_latents_never_part():
    """Latents that start at zero get equal gradients for ever.

    They do move, but m of them act as one.
    """
    adapter = randomise(LavishAdapter(16, latents=4))
    nn.init.zeros_(adapter.latents)
    x, other = torch.randn(2, 2, 9, 16).double()
    adapter(x, other).sin().sum().backward()
    gradient = adapter.latents.grad  # (4,16)
    assert gradient.any()
    assert_close(gradient, gradient[:1].expand(4, -1))


def test_latents_start_apart():
    """That is why they start at random, and why training, in small steps, leaves them different.

    With zeros, as the release has them for AVS and AVQA, m latents cost m times as much as one and
    do the work of one.
    """
    assert LavishAdapter(16, latents=4).latents.std(0).min() > 0.01


def test_what_is_not_said_is_the_papers():
    """Two latents, an eighth of the width, two groups, both directions: the adapters of AVE. Its
    28 events and background, 42 answers in MUSIC-AVQA, 101 actions in UCF101.

    Whoever copies the adapter types `LavishAdapter(dim)`.
    """
    net = Lavish(tiny_swin())
    for stream in (net.visual_adapters, net.audio_adapters):
        adapter = stream[0][0]
        dim = net.backbone.dims[0]
        assert adapter.latents.shape == (2, dim)
        assert [linear.weight.shape for linear in adapter.down] == 2 * [(dim // 16, dim // 2)]
        alone = LavishAdapter(dim).state_dict()
        for name, tensor in adapter.state_dict().items():
            assert alone[name].shape == tensor.shape
    assert AVE(net).head[1].out_features == 29
    assert AVQA(net).answer.out_features == 42
    assert AVQA(net).embedding.num_embeddings == 93
    assert lavish.UCF101(net).head.out_features == 101


# ---------------------------------------------------------------- two streams, one stream


@parametrize("backbone", [tiny_swin(), tiny_vit(ViT), tiny_vit(VideoMAE)])
def test_closed_gates_leave_the_frozen_backbone_alone(backbone):
    """A new Lavish is the backbone itself, of whatever kind, in all of its stages.

    The visual stream is what it makes of the frames, the audio stream what it makes of the sound
    as a grey picture.
    """
    frames, spectrograms = images(16)
    visual, audio = Lavish(backbone, reduction=4).double()(frames, spectrograms)
    assert_close(visual, backbone(frames))
    assert_close(audio, backbone(torch.stack([spectrograms] * 3, 1)))


def test_one_direction_is_from_sound_to_vision():
    """The audio stream does not depend on the frames, the visual one does on the sound.

    The rung of the ladder between late fusion and both directions.
    """
    net = tiny_lavish(one_direction=True)
    frames, spectrograms = images(2)
    visual, audio = net(frames, spectrograms)
    assert_close(net(frames.flip(0), spectrograms)[1], audio)
    again, _ = net(frames, spectrograms.flip(0))
    assert not torch.allclose(again[-1], visual[-1])


def test_recomputed_activations_change_nothing(monkeypatch):
    """Each block runs again in the backward pass, which saves memory.

    The gradients stay the same, and a batch counts once in the statistics of the batch norms,
    also of those outside the blocks, which run once.
    """
    plain, inputs = tiny_model("avs")
    block = Mock(side_effect=lavish.lavish_block)
    monkeypatch.setattr(lavish, "lavish_block", block)
    lean, _ = tiny_model("avs", checkpoint_activations=True)
    wanted = gradients(plain, plain(*inputs))
    assert block.call_count == 0  # the plain net was built before
    assert_close(gradients(lean, lean(*inputs)), wanted)
    assert block.call_count == 2 * 6  # six blocks
    for (name, buffer), recomputed in zip(plain.named_buffers(), lean.buffers()):
        if "running" in name:
            assert_close(recomputed, buffer)


@parametrize("one_direction", [False, True])
def test_a_compiled_block_gives_the_same_outputs_and_gradients(monkeypatch, one_direction):
    """With activations that are recomputed, and in evaluation. The graphs are torch's, run without
    generating code for them, which takes minutes.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    nets = []
    for compiled in (False, True):
        net = Lavish(
            tiny_vit(),
            one_direction=one_direction,
            checkpoint_activations=True,
            compile_blocks=compiled,
        )
        nets.append(randomise(net).train())
    plain, compiled = nets
    frames, spectrograms = images(3)
    inputs = (frames, spectrograms)
    outputs = [
        torch.cat([visual[-1], audio[-1]]) for visual, audio in (plain(*inputs), compiled(*inputs))
    ]
    assert_close(*outputs)
    wanted = gradients(plain, outputs[0])
    for name, gradient in gradients(compiled, outputs[1]).items():
        assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        assert_close(plain.eval()(*inputs), compiled.eval()(*inputs))


@parametrize("modality, own, other", [("v", 0, 1), ("a", 1, 0)])
def test_one_stream_is_half_of_two_that_do_not_meet(modality, own, other):
    """Its tokens are those of a two-stream net without latents. The input that is out does not
    matter, and the head gets zeros in its place.
    """
    net = randomise(OneStream(tiny_swin(), modality, reduction=4)).eval()
    both = tiny_lavish(latents=0)
    both.backbone = net.backbone
    both.visual_adapters = both.audio_adapters = net.adapters
    inputs = [*images(2)]
    wanted = both(*inputs)[own]
    inputs[other] = inputs[other].flip(0)
    streams = net(*inputs)
    assert_close(streams[own], wanted)
    assert not any(tokens.any() for tokens in streams[other])


@parametrize("backbone", [tiny_swin(), tiny_vit()])
def test_features_are_a_class_token_or_the_mean_over_tokens(backbone):
    """A ViT has a token that stands for the whole image, a Swin has not.

    The head of AVE reads the same width from either.
    """
    net = Lavish(backbone, reduction=4).double()
    frames, spectrograms = images(1, 3)
    visual, audio = net(frames[0], spectrograms[0])
    tokens = torch.cat([visual[-1], audio[-1]], -1)  # (3,N,2d)
    wanted = tokens[:, 0] if isinstance(backbone, ViT) else tokens.mean(1)
    assert_close(lavish.features_of(net, frames, spectrograms), wanted[None])


# ---------------------------------------------------------------- sound becomes an image


def textbook_log_mel(sound, size, shift):
    """Windows of 25 ms, without their mean; pre-emphasis; power spectrum; `size` triangles from
    20 Hz to 8 kHz, evenly spaced and straight-edged on the mel scale; logarithm.
    """
    windows = np.lib.stride_tricks.sliding_window_view(sound, 400)[::shift]  # (rows,400)
    windows = windows - windows.mean(1, keepdims=True)
    previous = np.hstack([windows[:, :1], windows[:, :-1]])
    windows = (windows - 0.97 * previous) * np.hanning(400)
    power = np.abs(np.fft.rfft(windows, 512)) ** 2  # (rows,257)
    mels = 1127 * np.log1p(np.linspace(0, 8000, 257) / 700)
    lowest = 1127 * np.log1p(20 / 700)
    edges = np.linspace(lowest, mels[-1], size + 2)
    triangles = [np.interp(mels, edges[k : k + 3], (0, 1, 0)) for k in range(size)]
    return np.log(np.maximum(power @ np.stack(triangles, 1), 2.0**-23))


@parametrize(
    "size, shift, rows",
    [
        (192, 83, 188),  # the paper's size: 5.2 ms are 83 samples
        (48, 332, 47),
    ],
)
def test_fbank_is_the_textbooks_log_mel_spectrogram(size, shift, rows):
    """Normalised to half a standard deviation, and after that padded with zeros to a square.

    Written here from the definition, in numpy, with nothing of Kaldi's or torchaudio's code.
    """
    sound = np.random.default_rng(0).normal(0, 0.1, 16000)
    image = lavish.fbank(torch.tensor(sound).float(), size, mean=-3.0, std=2.0)
    wanted = (textbook_log_mel(sound, size, shift) + 3) / 4
    np.testing.assert_allclose(image[:rows], wanted, atol=2e-3)
    assert len(image) == size
    assert not image[rows:].any()


# ---------------------------------------------------------------- the tasks' heads


def test_aves_head_cannot_compare_the_streams():
    """It is linear: without latents, to exchange the sounds of two clips leaves the sum of their
    logits as it is. So late fusion cannot tell whether a sound goes with a picture.
    """
    model = randomise(AVE(tiny_lavish(latents=0))).eval()
    frames, spectrograms = images(2, 3)
    own = model(frames, spectrograms).sum(0)
    assert_close(model(frames, spectrograms.flip(0)).sum(0), own)


def conv(layer, x):
    """A convolution that keeps the size of its map."""
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


def unit(layer, x):
    """AVSBench's residual unit. Its first relu works in place, so the shortcut is rectified."""
    x = F.relu(x)
    return conv(layer.conv2, F.relu(conv(layer.conv1, x))) + x


def naive_decoder(model, visual, audio):
    """AVSBench's decoder by torch's functions: three maps, fused from the coarsest to the finest.

    Widths, dilations, kinds of interpolation and relus as in avs_s4/model/PVT_AVSModel.py.
    """
    maps = []
    for i, side in enumerate((20, 10, 5)):  # 80 pixels / 4, / 8, / 16
        linear = model.project[i]
        y = F.linear(visual[i], linear.weight, linear.bias)  # (BT,N,w)
        images, tokens, width = y.shape
        y = y.transpose(1, 2).reshape(images, width, round(tokens**0.5), -1)
        y = F.interpolate(y, (side, side), mode="bicubic", align_corners=False)
        total = 0
        for layer, dilation in zip(model.context[i].convs, (3, 6, 12, 18)):
            total = total + F.conv2d(
                y, layer.weight, layer.bias, padding=dilation, dilation=dilation
            )
        if model.tpavi is not None:
            sound = F.linear(audio[-1].mean(1), model.audio.weight, model.audio.bias)
            total = released_tpavi(model.tpavi[i], total, sound.view(2, 3, -1))
        maps.append(total)
    x = unit(model.fuse[2], maps[2])
    x = F.interpolate(x, (10, 10), mode="bilinear", align_corners=True)
    x = unit(model.fuse[1], x + unit(model.skip[1], maps[1]))
    x = F.interpolate(x, (20, 20), mode="bilinear", align_corners=True)
    x = unit(model.fuse[0], x + unit(model.skip[0], maps[0]))
    x = F.interpolate(x, (40, 40), mode="bilinear", align_corners=True)
    first, _, second, _, third = model.mask
    x = F.interpolate(conv(first, x), (80, 80), mode="bilinear", align_corners=False)
    return conv(third, F.relu(conv(second, x))).view(2, 3, 80, 80).float()


@parametrize("tpavi", [False, True])
def test_the_decoder_of_masks_is_avsbenchs(tpavi):
    """Against torch's functions, written out for three stages.

    A dilation, an interpolation or a relu of another kind would still learn masks. The finest map
    is 20 pixels wide, because in a smaller one nothing lies 18 pixels away.
    """
    model = randomise(AVS(tiny_lavish(), 80, 8, tpavi)).eval()
    frames, spectrograms = images(2, 3)
    visual, audio = model.net(frames.flatten(0, 1), spectrograms.flatten(0, 1))
    logits = model(frames, spectrograms)
    assert_close(logits, naive_decoder(model, visual, audio))


def test_the_decoder_of_masks_has_avsbenchs_widths():
    """Those of PVT (avs_s4/model/PVT_AVSModel.py), and half and an eighth of 256 for the mask."""
    model = AVS(tiny_lavish(), 224, 256)
    assert [linear.out_features for linear in model.project] == [64, 128, 320]
    assert [context.convs[0].in_channels for context in model.context] == [64, 128, 320]
    shapes = [(m.out_channels, m.kernel_size[0]) for m in model.mask if isinstance(m, nn.Conv2d)]
    assert shapes == [(128, 3), (32, 3), (1, 1)]


def dense(layer, x):
    """A linear layer."""
    return x @ layer.weight.T + layer.bias


def naive_lstm(lstm, x):
    """The last hidden state and cell of words (B,W,D), gate by gate."""
    h = c = torch.zeros_like(x[:, 0])
    for word in x.unbind(1):
        gates = word @ lstm.weight_ih_l0.T + lstm.bias_ih_l0
        gates = gates + h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h, c


def naive_grounding_in_time(module, question, seconds):
    """Four heads of two channels, the question asking; then an MLP, a norm and the mean."""
    weights = module.attention.in_proj_weight.chunk(3)
    biases = module.attention.in_proj_bias.chunk(3)
    q = question @ weights[0].T + biases[0]  # (B,D)
    k = seconds @ weights[1].T + biases[1]  # (B,T,D)
    v = seconds @ weights[2].T + biases[2]
    heads = []
    for at in range(0, 8, 2):
        own = slice(at, at + 2)
        scores = (k[..., own] * q[:, None, own]).sum(-1) / 2**0.5  # (B,T)
        heads.append((scores.softmax(-1)[..., None] * v[..., own]).sum(1))
    z = dense(module.attention.out_proj, torch.cat(heads, -1))
    z = z + dense(module.mlp[3], dense(module.mlp[0], z).relu())
    z = F.layer_norm(z, z.shape[-1:], module.norm.weight, module.norm.bias)
    return z + seconds.mean(1)


def naive_grounding_in_space(model, tokens, heard):
    """The place where the sound is, beside the mean of all places."""
    tokens = dense(model.visual_in, tokens)  # (BT,N,D)
    cosine = F.cosine_similarity(tokens, heard[:, None], dim=-1)  # (BT,N)
    unit_length = tokens / tokens.norm(dim=-1, keepdim=True)
    place = torch.einsum("bn,bnd->bd", cosine.softmax(-1), unit_length)
    return dense(model.visual_out, torch.cat([tokens.mean(1), place], -1).tanh())


def test_grounding_in_time_has_four_heads():
    """Two would answer differently. The weights are large, so that it attends to something."""
    module = lavish.TemporalGrounding(8).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=2)
    question = torch.randn(2, 8).double()
    seconds = torch.randn(2, 5, 8).double()
    assert_close(module(question, seconds), naive_grounding_in_time(module, question, seconds))


def test_the_head_of_answers_is_music_avqas():
    """Answers and matches against a head written out: LSTM, grounding, fusion by a product.

    Where a tanh or a mean is missing, or a sum stands for the product, it would still learn.
    """
    model, (frames, spectrograms, question, negatives) = tiny_model("avqa")
    model.eval()
    visual, audio = model.net(frames.flatten(0, 1), spectrograms.flatten(0, 1))
    h, c = naive_lstm(model.lstm, model.embedding.weight[question].tanh())
    asked = dense(model.question, torch.cat([h, c], -1).tanh())
    heard = dense(model.audio_out, dense(model.audio_in, audio[-1].mean(1)).relu())
    seen = naive_grounding_in_space(model, visual[-1], heard)
    when = [
        naive_grounding_in_time(model.when_heard, asked, heard.view(2, 3, -1)),
        naive_grounding_in_time(model.when_seen, asked, seen.view(2, 3, -1)),
    ]
    fused = dense(model.fusion, torch.cat(when, -1).tanh())
    wanted = dense(model.answer, (asked * fused).tanh())

    foreign = model.net.backbone(negatives.flatten(0, 1))[-1]
    other = naive_grounding_in_space(model, foreign, heard)
    pairs = torch.cat([torch.cat([heard, seen], -1), torch.cat([heard, other], -1)])
    for k, layer in enumerate(m for m in model.match if isinstance(m, nn.Linear)):
        pairs = dense(layer, pairs if k == 0 else pairs.relu())

    answer, match = model(frames, spectrograms, question, negatives)
    assert_close(answer, wanted.float())
    assert_close(match, pairs.float())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, theirs = [
        torch.autograd.grad(outputs.sin().sum(), trained, allow_unused=True)
        for outputs in (match, pairs)
    ]
    for gradient, by_hand in zip(ours, theirs):
        assert (gradient is None) == (by_hand is None)
        if gradient is not None:
            assert_close(gradient, by_hand)


def test_the_head_of_answers_has_music_avqas_widths():
    """Those of its match classifier (net_avst.py:254-260), and the dropout of its grounding."""
    model = AVQA(Lavish(lavish.make_backbone("nano")))
    widths = [layer.weight.shape for layer in model.match if isinstance(layer, nn.Linear)]
    assert widths == [(512, 1024), (256, 512), (128, 256), (2, 128)]
    for module in (model.when_heard, model.when_seen):
        widths = [layer.weight.shape for layer in module.mlp if isinstance(layer, nn.Linear)]
        assert widths == [(512, 512), (512, 512)]
        assert module.attention.dropout == 0.1
        assert {part.p for part in module.mlp if isinstance(part, nn.Dropout)} == {0.1}


def test_a_sound_stays_beside_its_two_frames():
    """UCF101: spectrogram k goes with frames 2k and 2k+1, by the net on each pair alone."""
    model = randomise(lavish.UCF101(tiny_lavish(), 5)).eval()
    frames, spectrograms = images(1, 16)
    spectrograms = spectrograms[:, :8]
    features = []
    for k in range(16):
        visual, audio = model.net(frames[0, k : k + 1], spectrograms[0, k // 2 : k // 2 + 1])
        features.append(torch.cat([visual[-1].mean(1), audio[-1].mean(1)], -1))
    wanted = dense(model.head, torch.cat(features).mean(0, keepdim=True))
    assert_close(model(frames, spectrograms), wanted.float())


def test_every_trained_tensor_starts_as_published():
    """Gates at 0, norms as the identity, latents evenly between 0 and 1, the decoder's dilated
    convolutions at 0.01, all other layers as torch starts them.

    A start is a part of the method: with g at 1 the net would not begin as the frozen one.
    """
    torch.manual_seed(0)
    net = lavish.Lavish(lavish.make_backbone("nano"), latents=64)
    models = [AVE(net), AVS(net, 32, 64, tpavi=True), AVQA(net, hidden=64), lavish.UCF101(net)]
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert_starts_right(name, parameter)
    buffers = net.visual_adapters.named_buffers()
    assert {name: b for name, b in buffers if "running_mean" in name and b.any()} == {}


def assert_starts_right(name, parameter):
    """One tensor, by its name."""
    last = name.split(".")[-1]
    start = parameter.detach()
    if re.search(r"gate|tpavi.*bn\.weight|(norm|bn)\w*\.bias|in_proj_bias|out_proj.bias", name):
        assert not start.any(), name
    elif re.search(r"(norm|bn)\w*\.weight", name):
        assert (start == 1).all(), name
    elif last == "latents":
        assert 0 <= start.min() < 0.1 < 0.9 < start.max() < 1, name
        assert start.mean() == pytest.approx(0.5, abs=0.05), name
    elif "embedding" in name:
        assert start.std() == pytest.approx(1, rel=0.1), name
    elif re.search(r"context.*weight", name):
        assert start.std() == pytest.approx(0.01, rel=0.1), name
        assert start.abs().max() > 0.03, name  # normal, not within bounds
    elif "in_proj_weight" in name:
        bound = (6 / sum(start.shape)) ** 0.5
        assert 0.9 * bound < start.abs().max() <= bound, name
    else:  # uniform within 1 / sqrt(inputs); the LSTM's within 1 / sqrt(hidden)
        module = name.rpartition(".")[0]
        inputs = 64 if "lstm" in module or last == "bias" else start[0].numel()
        bound = inputs**-0.5
        if last == "weight" or "lstm" in module:
            assert 0.8 * bound < start.abs().max() <= bound * 1.0001, name
        else:
            assert start.abs().max() > 0, name


def test_features_beside_the_sound_enter_aves_head():
    """Table 3 of the supplementary: VGGish's features stand after those of the two streams."""
    model = randomise(AVE(tiny_lavish(), 7, extra_width=5)).eval()
    frames, spectrograms = images(2, 3)
    extra = torch.randn(2, 3, 5).to(frames)
    features = torch.cat([lavish.features_of(model.net, frames, spectrograms), extra], 2)
    first, second = model.head
    logits = dense(second, dense(first, features)).float()
    assert_close(model(frames, spectrograms, extra), logits)


def test_a_swin_from_scratch_starts_near_the_identity():
    """The toys pretrain one, and with norms that start at one it would not learn.

    Linear layers start at a deviation of 0.02 and the temperature at 1 / 10, as torchvision's.
    """
    torch.manual_seed(0)
    for name, start in lavish.make_backbone("nano").features[1:].named_parameters():
        if start.dim() == 2:
            assert 0.017 < start.std() < 0.023, name
        elif "norm1.weight" in name or "norm2.weight" in name:
            assert start.unique().item() == pytest.approx(0.2), name
        elif "norm.weight" in name:
            assert start.unique() == 1, name
        elif "logit_scale" in name:
            assert start.unique().item() == pytest.approx(math.log(10)), name
        else:
            assert not start.any(), name


@parametrize("tpavi", [False, True])
def test_the_first_mask_alone_is_the_first_of_all(tpavi):
    """The loss of S4 looks at no other.

    So the other frames need no decoding, which TPAVI alone mixes: mask and gradients are the same.
    """
    _, inputs = tiny_model("avs")
    model = randomise(AVS(tiny_lavish(), 20, 8, tpavi)).train()
    alone = model(*inputs, first_only=True)
    first = model(*inputs)[:, :1]
    assert_close(alone, first)
    assert_close(gradients(model, alone), gradients(model, first))


@parametrize("tpavi", [False, True])
def test_without_latents_segmentation_hears_through_tpavi_alone(tpavi):
    """The adapters do not listen, and only TPAVI brings sound into the decoder.

    Without it the net has none of its parameters either.
    """
    model = randomise(AVS(tiny_lavish(latents=0), 20, 8, tpavi)).eval()
    frames, spectrograms = images(2, 3)
    masks = model(frames, spectrograms)
    assert torch.allclose(model(frames, spectrograms.flip(0)), masks) != tpavi
    assert any("tpavi" in name for name in model.state_dict()) == tpavi


def test_tpavi_starts_without_sound():
    """Its batch norm starts at zero, so that what is left is the norm of the pixels.

    As AVSBench has it: the decoder begins as one without sound.
    """
    x = torch.randn(6, 4, 4, 8)
    z = lavish.TPAVI(8)(x.movedim(-1, 1), torch.randn(2, 3, 128))
    assert_close(z.movedim(1, -1), nn.LayerNorm(8)(x))


def test_grounding_weighs_positions_by_their_cosine_with_the_sound():
    """Image by image: a softmax over the positions, by how well each agrees with the sound, and
    beside it the plain mean.
    """
    model, _ = tiny_model("avqa")
    visual = torch.randn(3, 4, 64).double()
    heard = torch.randn(3, 8).double()
    for image, sound, grounded in zip(visual, heard, model.ground(visual, heard)):
        tokens = model.visual_in(image)  # (4,8)
        weights = F.cosine_similarity(tokens, sound).softmax(0)  # (4,)
        where = weights @ F.normalize(tokens)  # (8,)
        views = torch.cat([tokens.mean(0), where])
        assert_close(grounded, model.visual_out(views.tanh()))


def test_match_has_the_clips_own_frames_first():
    """The second half is of the negatives, which pass the frozen backbone without adapters.

    Both are compared with the clip's own sound. Without negatives there is no match.
    """
    model, inputs = tiny_model("avqa")
    frames, spectrograms, negatives = (inputs[i].flatten(0, 1) for i in (0, 1, 3))
    visual, audio = model.net(frames, spectrograms)
    foreign = model.net.backbone(negatives)
    heard = model.audio_out(model.audio_in(audio[-1].mean(1)).relu())
    _, match = model(*inputs)
    for half, tokens in zip(match.chunk(2), (visual[-1], foreign[-1])):
        pair = torch.cat([heard, model.ground(tokens, heard)], -1)
        assert_close(half, model.match(pair).float())
    assert model(*inputs[:3])[1] is None


def test_lstm_stays_out_of_bf16_autocast():
    """CPUs without bf16 instructions cannot run one in bf16.

    Whatever is cast around it, it gives float32.
    """
    model = AVQA(Lavish(lavish.make_backbone("nano")))
    hook = Mock(return_value=None)
    model.lstm.register_forward_hook(hook)
    with torch.autocast("cpu", torch.bfloat16):
        model.encode(torch.tensor([[1, 2, 3, 0]]))
    output, _ = hook.call_args.args[2]
    assert output.dtype == torch.float32


# ---------------------------------------------------------------- the frozen backbones


def assert_same_tokens(ours, theirs, their_tokens, size):
    """A backbone of ours, with the weights of theirs, gives their last tokens (1,N,d).

    theirs: a publisher's module
    their_tokens: the function that gives its tokens, the first ones or all of them
    """
    randomise(theirs.eval())
    lavish.load_pretrained(ours.double(), theirs.state_dict())
    frames, _ = images(1, size=size)
    wanted = their_tokens(frames).flatten(1, -2)
    assert_close(ours(frames)[-1][:, : wanted.shape[1]], wanted)


@parametrize("name, publisher", [("tiny", "swin_v2_t"), ("base", "swin_v2_b")])
def test_swin_equals_torchvision(name, publisher):
    """At the size of the published weights, 256 px, where no window shrinks.

    In narrower stages torchvision pads and attends to the padding, which Microsoft does not.
    """
    theirs = torchvision.models.get_model(publisher)
    their_tokens = nn.Sequential(theirs.features, theirs.norm)
    assert_same_tokens(lavish.make_backbone(name), theirs, their_tokens, 256)


def test_swin_equals_timm_where_windows_shrink():
    """At 64 px the stages are 16, 8, 4 and 2 tokens wide, under a window of 8.

    The last two therefore have one window each, of their own width.
    """
    timm = pytest.importorskip("timm", reason="an oracle for tests alone: pip install timm")
    theirs = timm.create_model("swinv2_tiny_window8_256", img_size=64, num_classes=0)
    assert_same_tokens(lavish.make_backbone("tiny", 64), theirs, theirs.forward_features, 64)


def test_attention_at_the_limits_of_temperature_and_mask():
    """1 / tau stops at 100, and across the seam of the shift no token sees another, however well
    they agree. By torchvision's own module.
    """
    theirs = torchvision.models.swin_transformer.ShiftedWindowAttentionV2(16, [4, 4], [2, 2], 2)
    randomise(theirs)
    nn.init.constant_(theirs.logit_scale, np.log(300))
    ours = lavish.WindowAttention(16, 2, 8, 4, 2).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 8, 16).double()
    assert_close(ours(x.flatten(1, 2)), theirs(x).flatten(1, 2))


def test_the_position_bias_stays_out_of_bf16_autocast():
    """Sixteen times a sigmoid in bf16 would be off by a sixteenth."""
    attention = lavish.WindowAttention(16, 2, 8, 4, 2)
    hook = Mock(return_value=None)
    attention.cpb_mlp.register_forward_hook(hook)
    with torch.autocast("cpu", torch.bfloat16):
        attention(torch.randn(1, 64, 16))
    assert hook.call_args.args[2].dtype == torch.float32


@parametrize("name", [name for name in lavish.BACKBONES if "nano" not in name])
def test_heads_are_as_wide_as_published(name):
    """32 channels each in a Swin-V2, 64 in a ViT. No tensor has their number in its shape: with
    another one the published weights load, and give other tokens.
    """
    with torch.device("meta"):
        backbone = lavish.make_backbone(name)
    for module in backbone.modules():
        if isinstance(module, lavish.WindowAttention):
            assert module.qkv.in_features == 32 * module.heads
        elif isinstance(module, nn.MultiheadAttention):
            assert module.embed_dim == 64 * module.num_heads


def test_weights_come_from_where_they_are_published():
    """By the lists of torchvision and of timm, which has Microsoft's files."""
    published = {
        "tiny": torchvision.models.Swin_V2_T_Weights.IMAGENET1K_V1,
        "base": torchvision.models.Swin_V2_B_Weights.IMAGENET1K_V1,
        "vit_base": torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1,
        "vit_large": torchvision.models.ViT_L_16_Weights.IMAGENET1K_V1,
        "resnet152": torchvision.models.ResNet152_Weights.IMAGENET1K_V1,
    }
    timm = pytest.importorskip("timm", reason="an oracle for tests alone: pip install timm")
    published["base12"] = timm.get_pretrained_cfg("swinv2_base_window12_192.ms_in22k")
    published["large"] = timm.get_pretrained_cfg("swinv2_large_window12_192.ms_in22k")
    for name, (*_, address) in lavish.BACKBONES.items():
        assert address == (published[name].url if name in published else None)


def test_vit_equals_timm():
    """A class token first, then the patches.

    All tokens are compared, because the adapters read them all.
    """
    timm = pytest.importorskip("timm", reason="an oracle for tests alone: pip install timm")
    theirs = timm.models.VisionTransformer(64, 16, embed_dim=32, depth=2, num_heads=2)
    assert_same_tokens(ViT(2, 2, 32, 64), theirs, theirs.forward_features, 64)


def test_vit_equals_torchvision():
    """Of torchvision's tokens only the first one comes out, the class token.

    Its blocks are torchvision's own; the embedding around them is ours.
    """
    theirs = torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 128)
    theirs.heads = nn.Unflatten(1, (1, 32))  # not classes
    assert_same_tokens(ViT(2, 2, 32, 64), theirs, theirs, 64)


def test_resnet_equals_torchvision_at_all_stages():
    """With ResNet-152's weights under their published names, closed gates and running statistics.

    Torchvision's own layers are the oracle: the update of a bottleneck is relu(x + f(x)) - x.
    """
    theirs = torchvision.models.resnet152().eval()
    ours = lavish.make_backbone("resnet152", 64).eval()
    lavish.load_pretrained(ours, theirs.state_dict())
    frames, _ = images(2, size=64)
    frames = frames.float()
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(frames))))
    net = Lavish(ours).train()
    visual, audio = net(frames, frames[:, 0])
    for tokens, layer in zip(visual, (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)):
        x = layer(x)
        wanted = x.flatten(2).transpose(1, 2)
        assert (tokens - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert lavish.image_vectors(ours, visual[-1]).shape == (2, 2048)
    assert audio[-1].shape == (2, 4, 2048)


@parametrize("name", ["vit_nano", "resnet_nano"])
@parametrize("option", ["", "--latents=0", "--modality=a", "--one-direction"])
def test_other_nano_backbones_learn_a_toy(toys, short_pretraining, name, option):
    """Pretrained on toy images, each once; of about as many parameters as nano."""
    parameters = [lavish.count_parameters(lavish.make_backbone(n))[1] for n in ("nano", name)]
    assert parameters[1] == pytest.approx(parameters[0], rel=0.15)
    shutil.copytree(toys / "ave", "toy/ave")
    main(f"ave --backbone={name} --epochs=2 {option}")
    assert Path(f"toy/{name}.pt").exists()
    first, second = losses("runs/ave")
    assert second < first


def test_videomae_embeds_tubelets_at_sine_positions():
    """A token is 2 frames of 16 x 16 pixels, plus sines and cosines of its number.

    By a loop over tokens and channels, with the formula of "Attention is all you need".
    """
    videomae = tiny_vit(VideoMAE)
    clip, _ = images(16)
    tubelets = clip.view(8, 2, 3, 2, 16, 2, 16).permute(0, 3, 5, 2, 1, 4, 6)
    tokens = videomae.conv_proj(tubelets.flatten(0, 2)).flatten(1)  # (32,32)
    exact = torch.arange(32, dtype=torch.double).sin().float()
    assert torch.equal(videomae.positions[:, 0].float(), exact)  # of angles in double precision
    for n, k in np.ndindex(32, 16):
        angle = n / 10000 ** (k / 16)
        tokens[n, 2 * k] += np.sin(angle)
        tokens[n, 2 * k + 1] += np.cos(angle)
    assert_close(videomae.embed(clip)[0], tokens, rtol=1e-4, atol=1e-5)


def test_videomae_at_224_pixels_has_the_published_positions():
    """1568 of them, and none in its weights, because the published files have none."""
    with torch.device("meta"):
        videomae = lavish.make_backbone("videomae")
    assert videomae.positions.shape == (1568, 768)
    assert "positions" not in videomae.state_dict()


@parametrize(
    "name, count",
    [("nano", 315982), ("vit_nano", 328400), ("resnet_nano", 341460), ("videomae_nano", 298432)],
)
def test_the_toys_backbones_are_those_of_the_readme(name, count):
    """By the number of their parameters, which stands beside their scores."""
    assert sum(p.numel() for p in lavish.make_backbone(name).parameters()) == count


def test_a_gpus_fused_attention_is_the_written_one(monkeypatch):
    """In outputs and gradients, with shifted windows: its kernel, which CPUs have too, is called by
    a tensor that says it lies on a GPU.
    """
    attention = randomise(lavish.WindowAttention(16, 2, side=8, window=4, shift=2))
    tokens = torch.randn(3, 64, 16, dtype=torch.double)
    written = attention(tokens)
    wanted = gradients(attention, [written])
    fused = Mock(side_effect=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = attention(tokens)
    assert fused.call_count == 1
    assert_close(found, written)
    assert_close(gradients(attention, [found]), wanted)


@parametrize("size", [40, 0, -32])
def test_an_image_that_patches_cannot_tile_is_refused(size):
    """Nor is one without pixels, of which 0 would be a multiple of everything."""
    fault = f"image size {size} is no multiple of 16"
    refuses(fault, ViT, 1, 1, 8, size)
    refuses(fault, lavish.ResNet, (1, 1, 1), 2, size)


@parametrize("size", [100, 576, 40, 0])
def test_an_image_that_windows_cannot_tile_is_refused(size):
    """The one line names sizes that fit: in the smallest the last stage is half a window wide."""
    depths = (1, 1, 1, 1)
    fault = f"image size {size} does not divide into windows of 12; 192 and multiples of 384 do"
    refuses(fault, lavish.SwinV2, 8, depths, depths, 12, size)
    for fits in (192, 384, 768):
        assert lavish.SwinV2(8, depths, depths, 12, fits).image_size == fits
    # A window of one token: its offsets would be 0 / 0.
    refuses("image size 16 does not divide into windows of 4", lavish.make_backbone, "nano", 16)


# ---------------------------------------------------------------- weights by their names elsewhere

MICROSOFT = {
    "features.0.0": "patch_embed.proj",
    "features.0.2": "patch_embed.norm",
    "features.1": "layers.0.blocks",
    "features.3": "layers.1.blocks",
    "features.5": "layers.2.blocks",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}
VIDEOMAE = {
    "conv_proj": "encoder.patch_embed.proj",
    "encoder.layers.encoder_layer_": "encoder.blocks.",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "ln_": "norm",
    "encoder.ln": "encoder.norm",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}


def renamed(backbone, names):
    """Its state dict under a publisher's names, with the biases of queries and values apart."""
    state = {}
    for name, tensor in backbone.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name.endswith("qkv.bias"):
            q_bias, _, v_bias = tensor.chunk(3)
            state[name.replace("qkv.", "q_")] = q_bias
            state[name.replace("qkv.", "v_")] = v_bias
        else:
            state[name] = tensor
    return state


@parametrize("first, wrapper", [(0, "model"), (1, "state_dict")])
def test_swin_loads_by_microsofts_names(first, wrapper):
    """Merging ends a stage there; from timm 0.9 on it starts the next one.

    Queries and values have their biases apart, and keys have none. The masks of shifted windows
    follow from the window and are not loaded. The tensors may be wrapped.
    """
    swin = tiny_swin()
    names = dict(MICROSOFT)
    names["features.2"] = f"layers.{first}.downsample"
    names["features.4"] = f"layers.{first + 1}.downsample"
    state = renamed(swin, names)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(5)
    loaded = tiny_swin(seed=1)
    lavish.load_pretrained(loaded, {wrapper: state})
    frames, _ = images(2)
    assert_close(loaded(frames), swin(frames))


@parametrize("norm", ["encoder.norm", "fc_norm"])
def test_videomae_loads_by_its_names(norm):
    """Those of its pretraining: an encoder's prefix, biases apart, and a decoder with its mask
    token, which are not used. Fine-tuned, the last norm has another name.
    """
    videomae = tiny_vit(VideoMAE)
    state = renamed(videomae, {**VIDEOMAE, "encoder.ln": norm})
    state["decoder.norm.weight"] = torch.zeros(5)
    state["mask_token"] = torch.zeros(1, 1, 16)
    loaded = VideoMAE(2, 2, 32, 32).double()
    lavish.load_pretrained(loaded, {"module": state})
    clip, _ = images(16)
    assert_close(loaded(clip), videomae(clip))


@parametrize(
    "checkpoint, fault",
    [
        (torch.zeros(3), "holds a Tensor"),
        ({"epoch": 3}, "as .'features.*but .'epoch'"),
        ({1: torch.zeros(3)}, 'Unexpected.*"1"'),
        ({}, "as .'features.*but .."),
        ({"net": {"a": torch.zeros(3)}}, "but .'net'"),
    ],
)
def test_weights_without_names_are_refused(checkpoint, fault):
    """Whatever torch.load may return, by a name that was found beside one that is wanted.

    A file may hold anything, and a trace would not say which file.
    """
    with pytest.raises(InputError, match=fault):
        lavish.load_pretrained(tiny_swin(), checkpoint)


def test_weights_that_do_not_fit_are_named_in_one_line():
    """What is missing, what is too much, what has another shape.

    With strict=False a net would run on random numbers in their place, without a word.
    """
    state = tiny_swin().state_dict()
    del state["norm.weight"]
    state["more"] = torch.zeros(1)
    state["norm.bias"] = torch.zeros(3)
    with pytest.raises(InputError, match="do not fit.*Missing.*norm.weight.*Unexpected.*more"):
        lavish.load_pretrained(tiny_swin(), state)
    state["norm.weight"] = torch.zeros(3)
    with pytest.raises(InputError, match="do not fit.*Unexpected.*more"):
        lavish.load_pretrained(tiny_swin(), state)
    del state["more"]
    with pytest.raises(InputError, match=r"mismatch for norm.weight.*\[3\]"):
        lavish.load_pretrained(tiny_swin(), state)


@parametrize("wrapper", ["model_state_dict", "state_dict_ema", "teacher"])
@parametrize("prefix", ["module.", "_orig_mod.", "backbone.", "module.backbone."])
def test_weights_load_as_training_programs_wrap_them(wrapper, prefix):
    """DistributedDataParallel, torch.compile and detectors put a word before each name."""
    swin = tiny_swin()
    state = {f"{prefix}{name}": tensor for name, tensor in swin.state_dict().items()}
    loaded = tiny_swin(seed=1)
    lavish.load_pretrained(loaded, {wrapper: {**state, "epoch": 5}})
    assert_same(loaded.state_dict(), swin.state_dict())


def test_weights_of_another_window_are_refused():
    """They would load, because no parameter has the window in its shape, and give other tokens.

    A table of the same shape that was made for another window (12to16 in Microsoft's names) has
    other values. Each block has its own table.
    """
    state = tiny_swin().state_dict()
    names = [name for name in state if name.endswith("relative_coords_table")]
    for name in names:
        own = 2 if name.startswith("features.5") else 4  # the last stage is 2 tokens wide
        for wrong, window in ((1.5 * state[name], own), (torch.zeros(1, 31, 31, 2), 16)):
            fault = rf"{name} are of another window \(of {window} tokens"
            with pytest.raises(InputError, match=fault):
                lavish.load_pretrained(tiny_swin(), {**state, name: wrong})
    for name in names:  # nothing is left that could tell
        del state[name]
    lavish.load_pretrained(tiny_swin(), state)
    # Microsoft's 12to16: as many offsets as a window of 16 has, on the scale of one of 12.
    swin = lavish.SwinV2(8, (1,), (1,), 16, 64)
    offsets = torch.arange(-15, 16) / 11 * 8
    offsets = offsets.sign() * (offsets.abs() + 1).log2() / 3
    table = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)[None]
    state = {**swin.state_dict(), "features.1.0.attn.relative_coords_table": table}
    refuses("of another window", lavish.load_pretrained, swin, state)
    state["features.1.0.attn.relative_coords_table"] = torch.ones(())
    refuses("of another window", lavish.load_pretrained, swin, state)


# ---------------------------------------------------------------- freezing, saving, the table


@parametrize("modality", ["av", "v"])
def test_adapters_and_head_alone_get_gradients(modality):
    """And the backbone stays in evaluation mode when the model trains, all the rest does not.

    That is what "frozen" means, and what makes the method parameter-efficient.
    """
    model, inputs = tiny_model("ave")
    if modality == "v":
        model.net = randomise(OneStream(tiny_swin(), "v", reduction=4))
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()
    model(*inputs).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ("backbone" in name), name
    for name, module in model.named_modules():
        assert module.training == ("backbone" not in name), name


def test_trained_state_goes_round():
    """What training changed, loaded beside the same frozen backbone, makes the model again.

    That includes the statistics of the batch norms, and excludes the backbone.
    """
    model, _ = tiny_model("ave")
    state = lavish.trained_state_dict(model)
    assert not any("backbone" in name for name in state)
    other = randomise(copy.deepcopy(model), seed=1)
    other.net.backbone = model.net.backbone
    lavish.load_trained_state_dict(other, state)
    assert_close(other.state_dict(), model.state_dict())


def test_trained_state_of_another_configuration_is_refused_by_name():
    """A run with three latents does not load into a net with two, and the message says where.

    Options of the command line and a checkpoint may well disagree.
    """
    state = lavish.trained_state_dict(tiny_lavish(latents=3))
    with pytest.raises(InputError, match="another configuration.*adapters.0.0.latents"):
        lavish.load_trained_state_dict(tiny_lavish(latents=2), state)


def test_the_readmes_block_gives_a_torchvision_vit_two_streams(monkeypatch):
    """The block is run as it stands there, on a ViT of two layers.

    The adapters alone are trainable, and while their gates are closed it is the ViT itself.
    """
    vit = torchvision.models.VisionTransformer(32, 16, 2, 12, 768, 3072).eval()
    vit.heads = nn.Identity()
    monkeypatch.setattr(torchvision.models, "vit_b_16", Mock(return_value=vit))
    readme = Path(lavish.__file__).with_name("README.md").read_text()
    scope = {}
    exec(re.search("```python\n([^`]*def two_streams[^`]*)```", readme)[1], scope)
    for name, parameter in vit.named_parameters():
        assert ("lav_" in name) == parameter.requires_grad, name
    frames, spectrograms = torch.randn(2, 2, 3, 32, 32)
    streams = scope["two_streams"](frames, spectrograms)
    assert_close(streams, (vit(frames), vit(spectrograms)))


def adapters_by_hand(backbone, latents, reduction, groups):
    """Parameters of all adapters by the sizes of their tensors: four beside each block."""
    count = 0
    for (blocks, _), d in zip(backbone.stages, backbone.dims):
        attention = latents * d + 1  # and its gate
        bottleneck = 2 * d * d // reduction // groups  # down and up
        norms = 2 * (d // reduction) + 2 * d + 4 * d  # of the batch, twice, and of a token, twice
        count += 4 * len(blocks) * (attention + bottleneck + norms + 1)
    return count


# What the heads have, in millions. AVQA's is that of the released module, AVS's that of its decoder
# without what it never uses; the three others are sums of a line.
HEADS = {"AVS": 19.13, "AVS+TPAVI": 19.99, "AVQA": 9.42}


def test_python_lavish_prints_a_clips_way_and_the_papers_parameters(capsys):
    """Each count by hand. Those of AVE are the paper's to a tenth of a million."""
    runpy.run_path(lavish.__file__, run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"logits +\(1, 10, 7\)\n", printed)
    _, _, table = printed.partition("total  paper\n")
    for line in table.splitlines():
        head, name, sizes, *counts, trained, paper_trained, total, paper_total = line.split()
        with torch.device("meta"):
            backbone = lavish.make_backbone(name)
        d = backbone.dims[-1]
        by_hand = {
            "AVE": ((2 * d + 1) * 512 + 513 * 29) / 1e6,
            "UCF101": (2 * d + 1) * 101 / 1e6,
            **HEADS,
        }[head]
        adapters = adapters_by_hand(backbone, *map(int, sizes.split("/"))) / 1e6
        frozen = lavish.count_parameters(backbone)[1] / 1e6
        if name not in ("videomae", "resnet152"):
            frozen += 21841 * (d + 1) / 1e6  # the classifier of ImageNet-22k
        wanted = [adapters, by_hand, adapters + by_hand, adapters + by_hand + frozen]
        assert np.allclose([float(x) for x in (*counts, trained, total)], wanted, atol=0.011)
        if head == "AVE" and name != "resnet152":
            assert float(trained) == pytest.approx(float(paper_trained), abs=0.07)
            assert float(total) == pytest.approx(float(paper_total), abs=0.07)
    assert len(table.splitlines()) == 10


# ---------------------------------------------------------------- data, training, command line

HERE = Path(train.__file__).parent
SIZE = data.TOY_SIZE
STATS = (lavish.AVE_MEAN, lavish.AVE_STD)
needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")

# ---------------------------------------------------------------- helpers


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    """Each test works in an empty folder.

    So that none finds what another one left.
    """
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def short_pretraining(monkeypatch):
    """Two steps: enough to see where the weights go."""
    monkeypatch.setattr(train, "pretrain_nano", partial(train.pretrain_nano, steps=2))


def refuses(fault, call, *arguments):
    """The call ends in an InputError of one line that says the fault.

    More lines would be a trace in all but name.
    """
    with pytest.raises(lavish.InputError, match=fault) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


def main(line):
    """What a person types after `python train.py`."""
    train.main(shlex.split(line))


def one_line_error(capsys, line, code=2):
    """What train.py says when it stops: one line on stderr, and the exit code.

    A trace would have more lines, and another code.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(line)
    error = capsys.readouterr().err
    assert stop.value.code == code
    assert error.startswith("train.py: ")
    assert error.count("\n") == 1
    return error


def result(run):
    """What a run wrote when it was done."""
    return json.loads(Path(run, "result.json").read_text())


def losses(run):
    """The loss of each epoch."""
    return [entry["loss"] for entry in result(run)["log"]]


def trained(run):
    """The weights that a run keeps."""
    return torch.load(f"{run}/adapters.pt")["trained"]


def assert_same(a, b):
    """Equal bit for bit, through dictionaries."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---------------------------------------------------------------- small data sets


def noise(seconds):
    """White noise in [-0.5, 0.5], the same in each call."""
    return np.random.default_rng(0).uniform(-0.5, 0.5, round(16000 * seconds))


def write_wav(path, samples, rate=16000):
    """Samples (N,) or (N, channels) in [-1, 1], as 16-bit PCM."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((samples[0].size, 2, rate, 0, "NONE", ""))
        file.writeframes((samples * 32767).round().astype("<i2").tobytes())


def write_grey(path, *greys):
    """A picture of 24 x 24 pixels: one grey, or several side by side."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    row = np.repeat(greys, 24 // len(greys))
    Image.fromarray(np.tile(row, (24, 1)).astype(np.uint8)).save(path, quality=95)


def write_video(root, video, greys, sound):
    """A video as `extract` leaves it: a grey frame a second, and a sound."""
    for number, grey in enumerate(greys, 1):
        write_grey(f"{root}/video_frames/{video}/{number}.jpg", grey)
    write_wav(f"{root}/raw_audio/{video}.wav", sound)


def grey_of(frames):
    """Normalised frames (T,3,S,S) -> the grey of each, 0 to 255."""
    red = frames[:, 0].mean((1, 2))
    return ((red * 0.229 + 0.485) * 255).round().tolist()


AVE_HEADER = "Category&VideoID&Quality&StartTime&EndTime\n"
AVE_ROWS = """Frying (food)&x_1&good&0&10
Church bell&-a b.c&good&2&4
Church bell&-a b.c&good&0&0
"""


AVQA_QUESTIONS = """[
{"video_id": "-0 1", "question_id": 0, "type": "[\\"Audio-Visual\\", \\"Comparative\\"]",
 "question_content": "Is the <Object> louder than the <Object>?",
 "templ_values": "[\\"guzheng\\", \\"piano\\"]", "anser": "no"},
{"video_id": "sa2", "question_id": 1, "type": "[\\"Audio-Visual\\", \\"Counting\\"]",
 "question_content": "How many sounding <Object> in the video\uff1f",
 "templ_values": "[\\"piano\\"]", "anser": "more than ten"},
{"video_id": "sa2", "question_id": 2, "type": "[\\"Audio-Visual\\", \\"Location\\"]",
 "question_content": "is the <LR> one louder? ", "templ_values": "[\\"left\\"]", "anser": "yes"}
]"""


# path: content of the lists of four small data sets
LISTS = {
    "ave/Annotations.txt": AVE_HEADER + AVE_ROWS,
    "ave/trainSet.txt": AVE_ROWS,
    "ave/valSet.txt": AVE_ROWS,
    "ave/testSet.txt": AVE_ROWS,
    "ave/fbank32.json": "[-3.0, 2.0]",
    "avs/s4_meta_data.csv": "split,x,category,name\ntrain,0,tabla,-1 a\ntest,0,tabla,-1 a\n",
    "avqa/avqa-train.json": AVQA_QUESTIONS,
    "avqa/avqa-test.json": AVQA_QUESTIONS,
    "ucf101/classInd.txt": "1 Act\r\n2 Bell\r\n",
    "ucf101/trainlist01.txt": "Act/v_aCT_g08_c01.avi 1\r\nBell/v_Bell_g24_c01.avi 2\r\n",
    "ucf101/testlist01.txt": "Bell/v_Bell_g01_c01.avi\r\n",
}


@pytest.fixture
def roots():
    """Small data sets, ave, avs, avqa and ucf101, with what the real ones have: odd names, a row
    without an event, a folder and a file that differ in case, no sound.
    """
    for root, video, greys, seconds in (
        ("ave", "x_1", range(10, 210, 20), 10),
        ("ave", "-a b.c", range(10, 210, 20), 10),
        ("avqa", "-0 1", range(0, 60, 10), 6),
        ("avqa", "sa2", range(100, 240, 10), 14),
        ("ucf101", "v_aCT_g08_c01", range(0, 128, 4), 4),
        ("ucf101", "v_Bell_g01_c01", range(0, 128, 4), 4),
    ):
        write_video(root, video, greys, noise(seconds))
    os.remove("ucf101/raw_audio/v_Bell_g01_c01.wav")
    for split in ("train", "test"):
        for k in range(1, 6):
            write_grey(f"avs/s4_data/visual_frames/{split}/tabla/-1 a/-1 a_{k}.png", 40 * k)
            write_grey(f"avs/s4_data/gt_masks/{split}/tabla/-1 a/-1 a_{k}.png", 255, 0)
        write_wav(f"avs/s4_data/audio_wav/{split}/tabla/-1 a.wav", noise(5))
    for path, content in LISTS.items():
        Path(path).write_bytes(content.encode())


def dataset(task, split="test", **more):
    """One of them, with the statistics of AVE.

    Statistics that are given keep the test free of the line about missing ones.
    """
    return data.DATASETS[task](task, split, SIZE, STATS, **more)


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A folder with a small toy of each task, and a nano.pt that was not pretrained.

    Made once for all tests. Pretraining would add some ten seconds to them.
    """
    folder = tmp_path_factory.mktemp("toys")
    clips = {"train": 4, "val": 1, "test": 3}
    with patch.dict(data.TOY_CLIPS, dict.fromkeys(data.TOY_CLIPS, clips)):
        for task in data.TOY_CLIPS:
            data.make_toy(task, str(folder / task))
    # So few questions for training do not have all answers of the others: ask the same ones.
    questions = json.loads((folder / "avqa/avqa-train.json").read_text())
    for split in clips:
        (folder / f"avqa/avqa-{split}.json").write_text(json.dumps(questions[:7]))
    data.save_tensors(lavish.make_backbone("nano").state_dict(), str(folder / "nano.pt"))
    return folder


# ---------------------------------------------------------------- toys


def test_the_mask_of_the_toy_of_avs_is_that_of_the_colour_that_sounds(toys):
    """The folder names what sounds, and the pixels within the mask have its colour.

    With the mask of another instrument the toy would teach that sound does not matter.
    """
    items = data.AVSBenchDataset(f"{toys}/avs", "test", SIZE, STATS)
    for i, (_, category) in enumerate(items.videos):
        inside = data.read_image(items.files(i)[0][0])[:, items[i][2][0] > 0]  # (3,n)
        colour = data.COLOURS[data.INSTRUMENTS[category].colour]
        assert np.allclose(inside.float().mean(1), colour, atol=15)


@parametrize(
    "seen, heard, asked, answers",
    [
        (["bell", "drum"], "horn", "horn", ["two", "horn", "zero", "no"]),
        (["bell", "drum"], "drum", "bell", ["two", "drum", "one", "no"]),
        (["drum"], "drum", "drum", ["one", "drum", "one", "yes"]),
    ],
)
def test_the_answers_of_the_toy_of_avqa(seen, heard, asked, answers):
    """As in its worked example: an instrument sounds in the video if it is seen and heard.

    A wrong table would be learned as well, and nothing else would tell.
    """
    rows = data.questions(seen, heard, asked)
    assert [row[-1] for row in rows] == answers
    assert json.loads(rows[-1][2]) == [data.INSTRUMENTS[asked].colour]


def heard_in(sound):
    """The instrument in a second of sound: the one whose lowest tone is nearest to the lowest
    strong one; None where there is noise alone.
    """
    if sound.square().mean().sqrt() < 0.006:
        return None
    spectrum = torch.fft.rfft(sound[:16000]).abs()  # a number for each whole Hz
    lowest = (spectrum > spectrum.max() / 2).nonzero()[0].item()
    distances = {}
    for name, instrument in data.INSTRUMENTS.items():
        distances[name] = abs(math.log(lowest / instrument.hertz))
    return min(distances, key=distances.get)


@parametrize("name", list(data.INSTRUMENTS))
def test_a_toys_instrument_sounds_as_its_row_says(name):
    """As loud as it is told, with its tones and its strokes, fading or held."""
    instrument = data.INSTRUMENTS[name]
    sound = data.record(name, 4, (0.1, 0.1), np.random.default_rng(0))
    assert len(sound) == 64000
    assert abs(np.sqrt(np.mean(sound**2)) - 0.1) < 0.001
    assert heard_in(torch.from_numpy(sound)) == name

    levels = np.sqrt(np.mean(sound.reshape(128, 500) ** 2, 1))  # 32 a second
    if instrument.fade:
        rhythm = abs(np.fft.rfft(levels - levels.mean()))  # a number for each quarter of 1 Hz
        assert rhythm.argmax() == 4 * instrument.strokes
        assert levels.max() > math.exp(0.5 * instrument.fade / instrument.strokes) * levels.min()
        ratios = levels[1:] / levels[:-1]  # it is struck at once and fades slowly
        assert ratios.max() > 2 / ratios.min()
    else:
        assert levels.max() < 1.5 * levels.min()


@parametrize("shape, share", [("bell", 0.785), ("flute", 0.5), ("drum", 0.98), ("horn", 0.295)])
def test_a_toys_outline_is_its_instruments(shape, share):
    """Circle, diamond, square and star by the share of the square around each that it fills, at
    the place and of the size and colour that are asked for.
    """
    rng = np.random.default_rng(0)
    front = data.Thing(shape, "drum", 0.6, 0.45, 0.3)
    behind = data.Thing("drum", "horn", 0.6, 0.45, 0.1)
    image, masks = data.render([behind, front], rng)
    for mask in masks:  # also that of what is covered
        rows, columns = mask.nonzero().T / 32
        assert abs(columns.float().mean() + 1 / 64 - 0.6) < 0.01
        assert abs(rows.float().mean() + 1 / 64 - 0.45) < 0.01
    assert abs(masks[1].float().mean() / 0.6**2 - share) < 0.02
    colour = image[:, masks[1]].float().mean(1)
    assert np.allclose(colour, data.COLOURS["blue"], atol=8)
    around = image[:, ~masks[1]].float()
    assert 30 < around.mean(1).min() < around.mean(1).max() < 120
    assert 10 < around.std(1).max() < 18


def test_instruments_of_a_film_circle_evenly():
    """At equal angles on a circle, all by the same angle from scene to scene: so they stay apart
    and within the image.
    """
    speeds = []
    for seed in range(4):
        scenes = data.film(["bell", "drum", "horn"], 4, np.random.default_rng(seed))
        places = []  # of the three in each scene, as complex numbers
        for _, masks in scenes:
            centres = [mask.nonzero().double().mean(0) / 32 + 1 / 64 - 0.5 for mask in masks]
            places.append([complex(column, row) for row, column in centres])
        places = np.array(places)  # (4,3)
        assert np.allclose(abs(places), 0.27, atol=0.01)
        assert np.allclose(places.sum(1), 0, atol=0.03)
        turns = np.angle(places[1:] / places[:-1])
        assert np.allclose(turns, turns[0, 0], atol=0.1)
        speeds.append(turns[0, 0])
    assert min(speeds) < -0.05 < 0.05 < max(speeds)


def area_of(name, image):
    """The share of an image (3,S,S) that has about the colour of an instrument."""
    colour = torch.tensor(data.COLOURS[data.INSTRUMENTS[name].colour])
    distance = (image - colour[:, None, None]).abs().amax(0)  # (S,S)
    return (distance < 60).float().mean()


def test_pictures_for_pretraining_are_of_their_classes(monkeypatch):
    """Four shapes times four colours, each whole within its picture."""
    spy = Mock(side_effect=data.render)
    monkeypatch.setattr(data, "render", spy)
    pictures, classes = data.toy_images(100, np.random.default_rng(0))
    assert set(classes.tolist()) == set(range(16))
    mean, std = torch.tensor([data.IMAGENET_MEAN, data.IMAGENET_STD])[..., None, None]
    pictures = (pictures * std + mean) * 255
    for call, number, picture in zip(spy.call_args_list, classes, pictures):
        (thing,), _ = call.args
        assert 4 * data.NAMES.index(thing.shape) + data.NAMES.index(thing.colour) == number
        assert thing.radius <= min(thing.x, thing.y)
        assert max(thing.x, thing.y) <= 1 - thing.radius
        assert area_of(thing.colour, picture) > thing.radius**2


def test_labels_of_the_toy_of_ave_are_where_loudness_fits_size(monkeypatch):
    """In the seconds of the event and in no other one its instrument is seen and heard, large and
    loud or small and soft.
    """
    render = Mock(side_effect=data.render)
    record = Mock(side_effect=data.record)
    monkeypatch.setattr(data, "render", render)
    monkeypatch.setattr(data, "record", record)
    with patch.dict(data.TOY_CLIPS, {"ave": {"train": 40}}):
        data.toy_ave("a", np.random.default_rng(0))
    lines = Path("a/trainSet.txt").read_text().splitlines()
    background = []  # whether the event is seen and whether it is heard, None if nothing is
    lengths = set()
    for second, (scene, sound) in enumerate(zip(render.call_args_list, record.call_args_list)):
        event, _, _, start, end = lines[second // 10].split("&")
        lengths.add(int(end) - int(start))
        heard, seconds, (softest, _), _ = sound.args
        assert seconds == 1
        seen = None
        fits = False
        for thing in scene.args[0]:
            seen = thing.shape
            assert thing.colour == seen
            fits = seen == heard == event and (thing.radius > 0.2) == (softest > 0.05)
        assert fits == (int(start) <= second % 10 < int(end))
        if not fits:
            background.append((seen and seen == event, heard and heard == event))
    assert second == 399
    assert lengths == {3, 4, 5, 6, 7}
    both = background.count((True, True)) / len(background)
    assert 0.5 < both < 0.7
    others = {(True, True), (None, True), (True, None), (True, False), (False, True)}
    assert set(background) == others


def test_the_toy_of_avqa_has_all_cases():
    """What sounds is seen or not, and what is asked for is one that is seen or the one heard."""
    with patch.dict(data.TOY_CLIPS, {"avqa": {"train": 40}}):
        data.toy_avqa("a", np.random.default_rng(0))
    rows = data.read_json("a/avqa-train.json")
    cases = []
    for first in range(0, len(rows), 4):
        count, heard, sounding, asked = rows[first : first + 4]
        colour = data.INSTRUMENTS[heard["anser"]].colour
        is_heard = json.loads(asked["templ_values"]) == [colour]
        cases.append((count["anser"], sounding["anser"], is_heard))
    assert set(cases) == {
        ("one", "zero", True),
        ("one", "zero", False),
        ("one", "one", True),
        ("two", "zero", True),
        ("two", "zero", False),
        ("two", "one", True),
        ("two", "one", False),
    }
    assert 10 <= [sounding for _, sounding, _ in cases].count("one") <= 30


def test_the_sounds_and_lists_of_the_toys_fit(toys):
    """What a folder, an answer or a class names is what is heard, and who says none has none."""
    items = data.AVEDataset(f"{toys}/ave", "val", SIZE, STATS)
    assert set(items.classes) <= set(data.NAMES)  # and the header is none
    assert (toys / "ave/Annotations.txt").read_text().count("\n") == 1 + 4 + 1 + 3
    for path in toys.glob("avs/s4_data/audio_wav/*/*/*.wav"):
        sound = read_wav(str(path))
        assert len(sound) == 5 * 16000
        assert heard_in(sound) == path.parent.name
    assert len(list(toys.glob("avs/s4_data/gt_masks/*/*/*/*.png"))) == 4 + 5 * 1 + 5 * 3
    for row in json.loads((toys / "avqa/avqa-train.json").read_text()):
        if "Which" in row["question_content"]:
            wav = f"{toys}/avqa/raw_audio/{row['video_id']}.wav"
            assert heard_in(read_wav(wav)) == row["anser"]
    wavs = set()
    for path in toys.glob("ucf101/raw_audio/*.wav"):
        _, seen, _, heard, group, _ = path.stem.split("_")
        assert heard_in(read_wav(str(path))) == heard
        wavs.add(heard)
    assert wavs == {"horn", "drum"}
    assert (toys / "ucf101/classInd.txt").read_text().startswith("1 bell_to_horn\n2 bell_to_drum\n")
    clips = (toys / "ucf101/trainlist01.txt").read_text().split()[:10:2]
    groups = [clip.partition("/v_bell_to_horn_")[2] for clip in clips]
    assert " ".join(groups) == "g08_c01.avi g08_c02.avi g09_c01.avi g09_c02.avi g24_c01.avi"


def test_a_toy_is_always_the_same(monkeypatch):
    """And holds nothing of one that was stopped."""
    os.mkdir("a.partial")
    Path("a.partial/x").write_bytes(b"")
    clips = {"train": 1, "val": 1, "test": 1}
    for root in ("a", "b/"):
        monkeypatch.setattr(sys, "argv", ["data.py", "toy", "avs", root])
        with patch.dict(data.TOY_CLIPS, {"avs": clips}), pytest.raises(SystemExit):
            data.main()
    a, b = [data.AVSBenchDataset(root, "test", SIZE)[0][1] for root in "ab"]
    assert_same(a, b)
    assert data.read_json("b/toy.json") == {"task": "avs"}
    assert sorted(os.listdir()) == ["a", "b"]
    assert sorted(os.listdir("a")) == ["fbank32.json", "s4_data", "s4_meta_data.csv", "toy.json"]


# ---------------------------------------------------------------- sound


@parametrize("rate, channels", [(16000, 1), (44100, 2), (8000, 1), (48000, 6)])
def test_any_channel_of_a_wav_of_any_rate_is_heard(rate, channels):
    """A tone in the last channel alone comes out, averaged over channels and without its mean.

    The release uses the left channel alone, and a tone on the right would be lost. The mean is
    removed as there: samples that are never zero would fill the lowest mel bins.
    """
    samples = np.full((2 * rate, channels), 0.1)
    samples[:, -1] += tone(rate)
    write_wav("a sound.wav", samples, rate)
    error = read_wav("a sound.wav").numpy() - tone(16000) / channels
    assert abs(error)[1000:-1000].max() < 1e-3  # resampling rings at the ends


def test_a_wav_of_an_odd_rate_is_resampled_by_a_close_ratio():
    """44,099 Hz as 44,100 Hz: the sound is off by 0.05 ms after two seconds.

    The exact ratio would take a filter of 12 GB.
    """
    write_wav("odd.wav", tone(44099), 44099)
    sound = read_wav("odd.wav")
    assert abs(len(sound) - 32000) <= 1
    assert np.corrcoef(sound, tone(16000)[: len(sound)])[0, 1] > 0.99


def tone(rate):
    """Two seconds of 440 Hz."""
    return 0.5 * np.sin(np.arange(2 * rate) * 2 * np.pi * 440 / rate)


@parametrize(
    "place, content, fault",
    [
        (34, b"\x08", "has 8 bit"),
        (34, b"\x18", "has 24 bit"),
        (24, bytes(4), "at 0 Hz"),
        (24, b"\xff" * 4, "at 4294967295 Hz"),
        (20, b"\3", "unknown format: 3"),  # float
        (40, bytes(4), "0 bytes of samples"),
    ],
)
def test_a_wav_of_another_format_is_refused(place, content, fault):
    """The one line names the file, what is wrong, and the command that converts it.

    These were traces, silence, or noise at full level: samples of another width, read as 16 bit.
    The bytes are written into the header: 34 is the width, 24 the rate, 20 the format, and 40 the
    length of the samples, which is 0 after a recorder was killed.
    """
    write_wav("bad.wav", noise(1))
    with open("bad.wav", "r+b") as file:
        file.seek(place)
        file.write(content)
    refuses(f"bad.wav .*{fault}.*ffmpeg", read_wav, "bad.wav")


def test_a_wav_with_the_extensible_header_is_read():
    """The same samples with the longer header, which sox writes for six channels or 96 kHz, are the
    same sound, also where another chunk stands before it, as recorders write them.

    "Is not a 16-bit PCM wav", it said: it is one. Before 3.12 Python's own reader refuses it.
    """
    write_wav("plain.wav", noise(1))
    samples = Path("plain.wav").read_bytes()[44:]
    form = struct.pack("<HHIIHHHHI", 0xFFFE, 1, 16000, 32000, 2, 16, 22, 16, 4)
    form += bytes.fromhex("0100000000001000800000aa00389b71")  # PCM
    content = b"WAVE"
    for name, chunk in ((b"JUNK", bytes(28)), (b"fmt ", form), (b"data", samples)):
        content += name + struct.pack("<I", len(chunk)) + chunk
    Path("long.wav").write_bytes(b"RIFF" + struct.pack("<I", len(content)) + content)
    assert_same(read_wav("long.wav"), read_wav("plain.wav"))


def test_a_cut_wav_is_read_as_far_as_it_goes():
    """The header may promise more samples than there are; half a header is refused.

    Downloads break off. What is there is sound, and the rest is silence.
    """
    write_wav("cut.wav", noise(1))
    os.truncate("cut.wav", 44 + 2001)
    assert len(read_wav("cut.wav")) == 1000
    write_wav("stereo.wav", np.stack([noise(1), noise(1)], 1))
    os.truncate("stereo.wav", 44 + 2002)
    assert len(read_wav("stereo.wav")) == 500
    for size in (30, 0):
        os.truncate("cut.wav", size)
        refuses("cut.wav is no wav that Python can read", read_wav, "cut.wav")


def test_full_scale_is_one():
    """Of 16 bits the least is -32768."""
    write_wav("loud.wav", np.array([-32768 / 32767, 0]))
    assert_same(read_wav("loud.wav"), torch.tensor([-0.5, 0.5]))  # without the mean


# ---------------------------------------------------------------- frames


def test_a_frame_stays_within_black_and_white():
    """Bicubic enlargement overshoots at an edge."""
    write_grey("edge.png", 0, 255)
    frames = data.read_frames(["edge.png"], 96)
    shades = frames * torch.tensor(data.IMAGENET_STD).view(3, 1, 1)
    shades = shades + torch.tensor(data.IMAGENET_MEAN).view(3, 1, 1)
    assert shades.min() >= -1e-6
    assert shades.max() <= 1 + 1e-6


def test_a_folder_without_frames_is_named():
    """The folder itself, and not a first frame that nobody ever wrote."""
    os.makedirs("ave/video_frames/empty")
    refuses(
        "no frames 0001.jpg, 0002.jpg ... in ave/video_frames/empty",
        data.video_files,
        "ave",
        "empty",
    )


def test_frames_are_resized_bicubically_with_antialiasing():
    """As PIL does it, up to its rounding to whole levels.

    Without antialiasing a large frame would become a sample of single pixels.
    """
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8))
    picture.save("noise.png")
    wanted = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC)) / 255
    frame = data.read_frames(["noise.png"], 16)[0].permute(1, 2, 0).numpy()
    error = frame * data.IMAGENET_STD + data.IMAGENET_MEAN - wanted
    assert abs(error).max() < 1.01 / 255


def save_kind(kind):
    """The same picture, red on the left and dark grey on the right, as a file of some kind."""
    colours = np.full((16, 24, 3), 60, np.uint8)
    colours[:, :12] = (200, 40, 40)
    picture = Image.fromarray(colours)
    if kind == "turned":  # EXIF 6: "turn this by 90 degrees clockwise"
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    elif kind == "palette":
        picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=2).save("palette.png")
    elif kind == "CMYK":
        picture.convert("CMYK").save("CMYK.jpg", quality=100)
    elif kind == "alpha":  # grey shows through where black is transparent
        alpha = np.full((16, 24, 4), 255, np.uint8)
        alpha[:, :12, :3] = (200, 40, 40)
        alpha[:, 12:] = (0, 0, 0, 195)
        Image.fromarray(alpha).save("alpha.png")
    else:
        picture.save("plain.png")
    return next(Path().glob(f"{kind}.*"))


@parametrize("kind", ["plain", "turned", "palette", "CMYK", "alpha"])
def test_an_image_is_read_as_people_see_it(kind):
    """Turned by its EXIF orientation, by the colours of its palette, on a white page.

    A frame of a telephone lay on its side, though every viewer turns it.
    """
    picture = data.read_image(str(save_kind(kind))).permute(1, 2, 0).float()  # (16,24,3)
    assert picture.shape == (16, 24, 3)
    assert np.allclose(picture[:, :10], (200, 40, 40), atol=4)
    assert np.allclose(picture[:, 14:], 60, atol=4)


def test_a_grey_image_has_three_equal_channels():
    """As grey, with an alpha channel that hides nothing, and with one bit."""
    for mode in ("L", "LA", "1"):
        Image.fromarray(np.eye(8, dtype=np.uint8) * 255).convert(mode).save("grey.png")
        assert_same(data.read_image("grey.png"), torch.eye(8).byte().mul(255).expand(3, 8, 8))


def test_an_image_that_cannot_be_a_frame_is_refused():
    """16 bits per channel, a film, a broken file, no file: the path is in the line.

    Pillow keeps half of 16 bits in a colour, cuts them off in a grey, and takes the first picture
    of a film.
    """
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save("deep.png")
    # 16 bits of red, green and blue, which Pillow reads but cannot write: one pixel.
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixel = zlib.compress(b"\0" + bytes(6))
    for chunk in (b"IHDR" + header, b"IDAT" + pixel, b"IEND"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    Path("colours.png").write_bytes(content)
    greys = [Image.new("L", (8, 8), grey) for grey in (0, 255)]
    greys[0].save("film.gif", save_all=True, append_images=greys[1:])
    os.rename("film.gif", "film.jpg")
    Path("broken.jpg").write_bytes(b"\0\1")
    for name in ("deep.png", "colours.png", "film.jpg", "broken.jpg", "none.jpg"):
        refuses(name, data.read_frames, [name], 16)


@parametrize("name", ["picture.jpg", "picture.png"])
def test_a_written_image_is_read_again(name):
    """A png holds every pixel, a jpg of quality 95 a smooth picture nearly."""
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(3, 32, 32)
    data.write_image(f"a folder/{name}", ramp)
    error = data.read_image(f"a folder/{name}").int() - ramp.int()
    assert error.abs().max() <= (3 if name.endswith("jpg") else 0)


# ---------------------------------------------------------------- AVE


@parametrize(
    "count, seconds, wanted",
    [
        (9, 10, [*range(9), 8]),
        (10, 10, range(10)),
        (11, 10, range(10)),
        (30, 10, range(1, 30, 3)),  # the middle frame of each second
        (30, 30, range(10)),  # a longer video: its first ten seconds
        (82, 10, range(4, 82, 8)),  # as many as ffmpeg -r 8 writes
        (5, 5, [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]),
    ],
)
def test_frame_t_of_ave_is_of_second_t(roots, count, seconds, wanted):
    """A frame too many or too few shifts none against its sound and label, and the length of the
    sound tells how many frames a second has.

    Stretched over the ten seconds, as in the release, half of 9 or 11 frames would be one off, and
    30 of a video of 30 seconds would be those of seconds 1, 4, 7 ...
    """
    shutil.rmtree("ave/video_frames/x_1")
    write_video("ave", "x_1", range(0, 3 * count, 3), noise(seconds))
    frames, spectrograms, _ = dataset("ave")[0]
    assert np.allclose(grey_of(frames), [3 * k for k in wanted], atol=1)
    sound = read_wav("ave/raw_audio/x_1.wav")
    assert_same(spectrograms[4], fbank(sound[64000:80000], SIZE))


@parametrize(
    "count, seconds",
    [(10, 30), (12, 10), (15, 10), (10, 7), (75, 10), (35, 10), (45, 10), (26, 10), (375, 30)],
)
def test_frames_that_do_not_fit_the_sound_are_refused(roots, count, seconds):
    """Which frame is of which second, nobody can tell: ffmpeg -r 1 writes 12 frames for 10 s, of
    which 8 are of the second before. 75 frames in 10 s may be 8 a second, too few of them, or 7.5:
    read as 8, the last seconds had frames of the next ones.
    """
    shutil.rmtree("ave/video_frames/x_1")
    write_video("ave", "x_1", range(count), noise(seconds))
    refuses(f"x_1 has {count} frames.*{seconds}.0 s", dataset("ave").__getitem__, 0)


@parametrize("header", [AVE_HEADER, ""])
def test_sound_and_label_t_of_ave_are_of_second_t(roots, header):
    """With a header in the annotations or without. Classes are numbered in their order.

    The zip's copy of the annotations has a header, all other copies have none.
    """
    Path("ave/Annotations.txt").write_text(header + AVE_ROWS)
    items = dataset("ave")
    assert items.classes == ["Frying (food)", "Church bell"]
    assert items[0][-1].tolist() == [0] * 10
    assert items[1][-1].tolist() == [2, 2, 1, 1, 2, 2, 2, 2, 2, 2]
    assert items[2][-1].tolist() == [2] * 10  # start = end = 0
    sound = read_wav("ave/raw_audio/-a b.c.wav")
    assert_same(items[1][1][3], fbank(sound[48000:64000], SIZE))


def test_features_of_ave_belong_to_the_line_of_the_clip(roots):
    """Whatever the order of the split; a clip without a row of its own is refused.

    A video may have several rows, with other features in each.
    """
    features = torch.rand(3, 10, 128)
    np.save("vggish.npy", features)
    first, _, last = AVE_ROWS.splitlines()
    Path("ave/valSet.txt").write_text(f"{last}\n{first}")
    items = dataset("ave", "val", extra_audio="vggish.npy")
    assert_same(items[0][2], features[2])
    assert_same(items[1][2], features[0])
    for shape in ((2, 10, 128), (3, 10, 64)):
        np.save("wrong.npy", np.zeros(shape))
        fault = r"wrong.npy has shape .*, not \(3, 10, 128\)"
        with pytest.raises(lavish.InputError, match=fault):
            dataset("ave", "val", extra_audio="wrong.npy")
    Path("ave/valSet.txt").write_text(first.replace("good", "fair"))
    with pytest.raises(lavish.InputError, match="'Frying.*fair"):
        dataset("ave", "val", extra_audio="vggish.npy")


# ---------------------------------------------------------------- AVSBench


MASK = "avs/s4_data/gt_masks/test/tabla/-1 a/-1 a_2.png"


@parametrize("on, off, wanted", [(1, 0, 1), (2, 0, 1), (255, 0, 1), (0, 0, 0)])
def test_masks_are_read_however_they_are_stored(roots, on, off, wanted):
    """As 0 and 1, as 0 and 2, as 0 and 255, or empty.

    Converted to one bit, as in the release, a mask of 0 and 1 would be all black.
    """
    write_grey(MASK, on, off)
    frames, _, masks = dataset("avs")[0]
    assert grey_of(frames) == [40, 80, 120, 160, 200]
    assert masks.shape == (5, 24, 24)
    assert masks[1, :, :12].unique() == wanted
    assert masks[1, :, 12:].sum() == 0


def test_second_t_of_avs_is_second_t_of_the_sound(roots):
    """And a mask that is missing is known before training."""
    items = dataset("avs")
    sound = read_wav("avs/s4_data/audio_wav/test/tabla/-1 a.wav")
    for t, spectrogram in enumerate(items[0][1]):
        assert_same(spectrogram, fbank(sound[16000 * t :][:16000], SIZE))
    assert data.missing_files(items) == []
    os.remove(MASK)
    assert data.missing_files(items) == [MASK]


def test_a_mask_that_was_resized_has_greys(roots):
    """Between black and white: what is above half belongs to it."""
    ramp = np.tile(np.arange(24) * 11, (24, 1)).astype(np.uint8)
    Image.fromarray(ramp).save(MASK)
    _, _, masks = dataset("avs")[0]
    assert masks[1].sum(1).unique() == 12  # from 132 on


@parametrize("mode", ["1", "P", "RGBA"])
def test_masks_of_every_mode_are_read(roots, mode):
    """One bit, a palette's second colour, or opaque colours."""
    white = Image.fromarray(np.tile(np.repeat([255, 0], 12), (24, 1)).astype(np.uint8))
    if mode == "P":
        picture = white.point(lambda value: value // 255).convert("P")
        picture.putpalette([0, 0, 0, 128, 0, 0])
    else:
        picture = white.convert(mode)
    picture.save(MASK)
    mask = dataset("avs")[0][2][1]
    assert mask[:, :12].all()
    assert not mask[:, 12:].any()


@parametrize(
    "kind, found", [("counts", "0, 1, 2"), ("colours", "0, 128"), ("alpha", "transparent")]
)
def test_masks_that_may_mean_something_else_are_refused(roots, kind, found):
    """The numbers of sources in other subsets of AVSBench, two colours, transparency.

    They were all empty or all full, without a word.
    """
    thirds = np.repeat([0, 1, 2], 8)
    counts = Image.fromarray(np.tile(thirds, (24, 1)).astype(np.uint8))
    if kind == "colours":
        counts = counts.convert("P")
        counts.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    if kind == "alpha":
        counts = counts.point([0, 255, 255] + [0] * 253)
        counts = Image.merge("LA", [Image.new("L", (24, 24), 255), counts])
    counts.save(MASK)
    refuses(f"a_2.png .*{found}", dataset("avs").__getitem__, 0)


@parametrize("shades", [[0, 1, 255], [*range(0, 96, 4)]])
@parametrize("coloured", [False, True])
def test_shades_that_make_no_mask_are_refused(roots, shades, coloured):
    """Three of them may mark pixels to leave out; a picture may be all dark, or coloured."""
    row = np.resize(shades, 24)
    if coloured:
        row = np.stack([row * 2, row, row], 1)[None]
    Image.fromarray(np.broadcast_to(row, (24, *row.shape[-2:])).astype(np.uint8)).save(MASK)
    refuses("a_2.png is neither black and one colour nor greys", dataset("avs").__getitem__, 0)


def test_training_has_the_mask_of_the_first_frame_alone(roots):
    """The list is read by the names of its columns, in any order and with others between.

    Of the five only that one is published for training.
    """
    assert dataset("avs", "train")[0][2].shape == (1, 24, 24)


# ---------------------------------------------------------------- MUSIC-AVQA


@parametrize("seconds, rate", [(59.5, 1), (60.019, 1), (60.7, 1), (60, 8)])
def test_frame_and_sound_of_a_moment_are_of_one_second(roots, seconds, rate):
    """Frames count the seconds: a sound that is a little longer or shorter shifts nothing. Moments
    are truncated as in the release, np.linspace(1, 60, 10, dtype=int) - 1.

    Where frames were rounded and seconds of sound counted upwards, 60.019 s of sound shifted half
    of the moments by a second. At 8 frames a second, which the scripts of MUSIC-AVQA can write, 8
    of 10 moments were silent.
    """
    write_video("avqa", "sa2", np.repeat(range(0, 240, 4), rate), noise(seconds))
    frames, spectrograms, *_ = dataset("avqa")[1]
    moments = [0, 6, 13, 19, 26, 32, 39, 45, 52, 59]
    assert grey_of(frames) == [4 * second for second in moments]
    sound = read_wav("avqa/raw_audio/sa2.wav")
    for second, spectrogram in zip(moments[:-1], spectrograms):
        assert_same(spectrogram, fbank(sound[16000 * second :][:16000], SIZE))


def test_vocabulary_and_questions_of_avqa(roots):
    """Words and answers in the order of training, templates filled, short questions padded. Given
    a vocabulary, as by a checkpoint, the training questions are not needed.

    The indices are the rows of the embedding: another order would be another net.
    """
    vocabulary = dataset("avqa", "train").vocabulary
    words = "<pad> Is the guzheng louder than piano How many sounding in video is left one"
    assert " ".join(vocabulary["words"]) == words
    assert vocabulary["answers"] == ["no", "more than ten", "yes"]
    os.remove("avqa/avqa-train.json")
    items = dataset("avqa", vocabulary=vocabulary)
    assert items[0][2].tolist() == [1, 2, 3, 4, 5, 2, 6]
    assert items[2][2].tolist() == [12, 2, 13, 14, 4, 0, 0]
    assert items[2][3] == 2


def test_negatives_are_of_other_videos_and_drawn_anew_in_each_epoch(roots):
    """They follow from seed, epoch and item alone.

    The first video is dark and the second one bright, so that a frame tells where it is from.
    """
    training = data.NegativeFrames(dataset("avqa", "train"), 0)
    bright = training[0][3]
    dark = training[1][3]
    assert min(grey_of(bright)) >= 99
    assert max(grey_of(dark)) <= 51
    assert_same(data.NegativeFrames(dataset("avqa", "train"), 0)[0][3], bright)
    assert not torch.equal(data.NegativeFrames(dataset("avqa", "train"), 1)[0][3], bright)
    assert not torch.equal(training[2][3], dark)
    training.epoch = 1
    assert not torch.equal(training[0][3], bright)


def test_a_template_takes_as_many_values_as_it_has_places():
    """The published ones have two at most: of three the last one would be the second again."""
    assert data.fill_template("<A> <B> or <C>?", ["x", "y", 3]) == ["x", "y", "or", "3"]


def test_numbers_in_a_list_of_questions_are_words():
    """An ID is a name, and an answer a class, whether json has quotes around it or not."""
    rows = json.loads(AVQA_QUESTIONS)
    rows[0].update(video_id=5, anser=2)
    Path("numbers.json").write_text(json.dumps(rows))
    question = data.read_questions("numbers.json")[0]
    assert (question["video"], question["answer"]) == ("5", "2")


def test_negatives_are_of_all_other_videos(roots):
    """Each moment draws a video of its own."""
    rows = json.loads(AVQA_QUESTIONS)
    rows[2]["video_id"] = "black"
    Path("avqa/avqa-train.json").write_text(json.dumps(rows))
    write_video("avqa", "black", [0] * 6, noise(6))
    write_video("avqa", "-0 1", [50] * 6, noise(6))
    greys = grey_of(data.NegativeFrames(dataset("avqa", "train"), 0)[1][3])
    assert {*greys} == {0, 50}


def test_negatives_want_a_second_video(roots):
    """There is one for each moment. With one video, there is no other one to draw from."""
    negatives = data.NegativeFrames(dataset("avqa", "train"), 0)[0][3]
    assert negatives.shape == (10, 3, SIZE, SIZE)
    rows = json.loads(AVQA_QUESTIONS)
    Path("avqa/avqa-train.json").write_text(json.dumps(rows[1:]))
    refuses("avqa needs two videos", data.NegativeFrames, dataset("avqa", "train"), 0)


# ---------------------------------------------------------------- UCF101


def test_labels_of_ucf101_are_folders_and_groups_24_and_25_are_val(roots):
    """The name of a file may differ from its folder's in case.

    Clips of a group are cut from one video, so that a group must not be torn apart.
    """
    for split, video, label in (
        ("train", "v_aCT_g08_c01", "Act"),
        ("val", "v_Bell_g24_c01", "Bell"),
        ("test", "v_Bell_g01_c01", "Bell"),
    ):
        items = dataset("ucf101", split)
        assert items.videos == [video]
        assert items.about == [(label, 8)]
    Path("ucf101/trainlist01.txt").write_text("Act/v_aCT_g23_c01.avi 1\nAct/v_aCT_g25_c01.avi 1\n")
    assert dataset("ucf101", "train").videos == ["v_aCT_g23_c01"]
    assert dataset("ucf101", "val").videos == ["v_aCT_g25_c01"]


def test_items_of_ucf101(roots):
    """16 frames evenly over the clip, eight seconds of sound centred between two of them; where
    there is no sound there is silence.

    Frame k of 32 has the grey 4 k; the middles of 16 equal parts are the odd ones.
    """
    frames, spectrograms, label = dataset("ucf101", "train")[0]
    assert grey_of(frames) == [*range(4, 128, 8)]
    sound = read_wav("ucf101/raw_audio/v_aCT_g08_c01.wav")
    assert_same(spectrograms[2], fbank(sound[12000:28000], SIZE))
    assert label == 0
    _, spectrograms, label = dataset("ucf101", "test")[0]
    assert (spectrograms == fbank(torch.zeros(16000), SIZE)).all()
    assert label == 1


def test_ucf101_without_clips_of_a_split_is_refused(roots):
    """A training list of one's own may have no groups 24 and 25."""
    path = Path("ucf101/trainlist01.txt")
    path.write_text(path.read_text().replace("_g24_", "_g09_"))
    refuses("trainlist01.txt lists no val clips", dataset, "ucf101", "val")


# ---------------------------------------------------------------- all data sets


def test_a_video_is_read_once_for_questions_in_a_row_and_a_toy_once_for_all(roots, monkeypatch):
    """Of a toy every video is kept, of other data the last one.

    A question on a video of a minute would read it again, and a toy would be read in each epoch.
    """
    read = []
    read_frames = data.read_frames

    def spy(paths, size):
        read.append(Path(paths[0]).parent.name)
        return read_frames(paths, size)

    monkeypatch.setattr(data, "read_frames", spy)
    items = dataset("avqa")  # one question about "-0 1", two about "sa2"
    wanted = [items[i] for i in (0, 1, 2, 0)]
    assert read == ["-0 1", "sa2", "-0 1"]
    Path("avqa/toy.json").write_text("{}")
    toy = dataset("avqa")
    read.clear()
    for i, item in zip((0, 1, 2, 0), wanted):
        assert_same([*toy[i]], [*item])
    assert read == ["-0 1", "sa2"]


# ---------------------------------------------------------------- what is wrong with data


@parametrize(
    "file, old, new, fault",
    [
        ("ave/testSet.txt", b"Frying", b"Whale", "testSet.txt: 'Whale"),
        ("ave/testSet.txt", b"(?s).*", b"", "testSet.txt is empty"),
        ("ave/testSet.txt", b"2&4", b"4&2", "testSet.txt: 'Church bell.*Start < End"),
        ("ave/testSet.txt", b"2&4", b"3&3", "testSet.txt: 'Church bell.*Start < End"),
        ("ave/Annotations.txt", b"Frying", b"\xff", "Annotations.txt is not UTF-8"),
        ("ave/fbank32.json", b"2.0.*", b"", "fbank32.json is not .mean, std."),
        ("ave/fbank32.json", b"2.0", b"0", "fbank32.json is not .mean, std."),
        ("avs/s4_meta_data.csv", b"test", b"val", "lists no test clips"),
        ("avs/s4_meta_data.csv", b"split.*\n", b"", "s4_meta_data.csv: no name, category or split"),
        ("avs/s4_meta_data.csv", b"train", b"trian", "s4_meta_data.csv: no name, .*'trian'"),
        ("avs/s4_meta_data.csv", b"\n", b'\n"', "s4_meta_data.csv: .* a quotation mark left open"),
        ("avqa/avqa-test.json", b"(?s).*", b"null", "avqa-test.json"),
        ("avqa/avqa-test.json", b"(?s).*", b"[" * 100000, "avqa-test.json is not JSON"),
        ("avqa/avqa-test.json", b"(?s).*", b"[]", "avqa-test.json should hold a list"),
        ("avqa/avqa-test.json", b"(?s).*", b'{"a": 1}', "avqa-test.json should hold a list"),
        ("avqa/avqa-test.json", b"anser", b"answer", "avqa-test.json, question 1: .*anser"),
        ("avqa/avqa-test.json", b'"video_id": "-0 1", ', b"", "question 1: .*video_id"),
        ("avqa/avqa-test.json", b'"no"', b'"maybe"', "avqa-test.json: .*'maybe'"),
        ("avqa/avqa-test.json", b"than", b"than the the", "Is the guzheng .*more than 7"),
        ("avqa/avqa-test.json", b"louder", b"softer", "no training question has the word 'softer'"),
        ("avqa/avqa-test.json", b'"type": .*', b'"type": "music",', "question 1: missing or wrong"),
        ("avqa/avqa-test.json", b'"type": .*', b'"type": null,', "question 1: missing or wrong"),
        ("ucf101/testlist01.txt", b"/", b" ", "testlist01.txt: '.*is not CLASS"),
    ],
)
def test_lists_of_a_wrong_form_are_refused(roots, file, old, new, fault):
    """The one line names the file and the place in it.

    Each list is right but for one place. Found in __init__, it costs seconds; found in the middle
    of a test, the hours before it.
    """
    content = Path(file).read_bytes()
    Path(file).write_bytes(re.sub(old, new, content, count=1))
    task = Path(file).parent.name
    refuses(fault, data.DATASETS[task], task, "test", SIZE)


@parametrize("task", ["ave", "avs", "avqa", "ucf101"])
def test_a_byte_order_mark_is_not_part_of_a_list(roots, task):
    """With it, "\ufeffCategory" was an event more, and the head had another width."""
    clean = dataset(task)
    lists = [*Path(task).glob("*.txt"), *Path(task).glob("*.csv"), *Path(task).glob("*.json")]
    for path in lists:
        mark = b"\xef\xbb\xbf"
        path.write_bytes(mark + mark + path.read_bytes().replace(b"\n", b"\n" + mark))
    marked = dataset(task)
    assert len(marked) == len(clean)
    assert_same([*marked[0]], [*clean[0]])
    assert getattr(marked, "classes", None) == getattr(clean, "classes", None)


def cut(path):
    """The end of a file is lost, as by a full disk."""
    path.write_bytes(path.read_bytes()[:-200])


def make_a_film(path):
    """A picture of two, of which a viewer shows one after the other."""
    second = Image.new("L", (24, 24), 255)
    Image.new("L", (24, 24)).save(path, "GIF", save_all=True, append_images=[second])


@parametrize(
    "damage, file, fault",
    [
        (make_a_film, "video_frames/x_1/5.jpg", "5.jpg is no readable jpg or png .*'ave/.*/5.jpg'"),
        (os.remove, "video_frames/x_1/5.jpg", "ave/video_frames/x_1/6.jpg .*before it is missing"),
        (os.remove, "video_frames/x_1/1.jpg", "ave/video_frames/x_1/2.jpg .*before it is missing"),
        (cut, "video_frames/x_1/5.jpg", "ave/video_frames/x_1/5.jpg is no readable jpg or png"),
        (os.remove, "raw_audio/x_1.wav", "no sound at ave/raw_audio/x_1.wav"),
        (os.remove, "valSet.txt", "val: no ave/valSet.txt"),
    ],
)
def test_check_finds_what_is_damaged_or_missing(roots, capsys, damage, file, fault):
    """It reads every item once, so that training does not stop at the last one. One fault does not
    hide the others.
    """
    os.remove("ave/raw_audio/-a b.c.wav")
    damage(Path("ave", file))
    assert data.check("ave", "ave", SIZE) == 1
    printed = capsys.readouterr().out
    assert re.search(fault, printed)
    assert "-a b.c.wav" in printed


@parametrize("task", ["ave", "avs", "avqa", "ucf101"])
def test_check_goes_on_after_any_error(roots, capsys, monkeypatch, task):
    """The paths and the error are printed, then the next item is read.

    An animated GIF that was named 0001.jpg ended it in a trace without a path.
    """
    calls = []

    def fail(*_):
        calls.append(1)
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(data, "spectrograms_of", fail)
    assert data.check(task, task, SIZE) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "unforeseen" in line]
    assert len(lines) == len(calls) > 1
    assert all(re.search(f"{task}/.* or .*: RuntimeError", line) for line in lines)


@parametrize("text", ["Is the <Object> loud?", "Is  the <Object> loud ?", "Is the <Object> loud"])
def test_a_template_is_filled_however_it_is_spaced(text):
    """A space more made a word without letters, and no question mark a word without its end."""
    assert data.fill_template(text, ["flute"]) == ["Is", "the", "flute", "loud"]


def test_empty_lines_and_other_files_are_no_items(roots):
    """Editors leave an empty line at the end, systems a thumbnail among the frames."""
    before = dataset("ave")
    for path in Path("ave").glob("*.txt"):
        path.write_text("\n" + path.read_text().replace("\n", "\n\n"))
    for name in (".DS_Store", "0.png", "thumb.jpg", "1.jpg.part"):
        Path("ave/video_frames/x_1", name).write_text("no frame")
    after = dataset("ave")
    assert after.clips == before.clips
    assert after.videos == before.videos
    assert after.files(0) == before.files(0)


def test_a_mask_of_another_size_is_refused(roots):
    """All masks of a batch are one tensor."""
    Image.new("L", (24, 30)).save(MASK)
    refuses("a_2.png is 24 x 30; make all masks square", dataset("avs").__getitem__, 0)


def test_check_reads_frames_that_only_a_negative_may_be(roots, capsys):
    """Training draws negatives from all frames of a video, also from those between the moments."""
    between = "avqa/video_frames/sa2/4.jpg"  # of 14 frames ten are read
    assert between not in dataset("avqa", "train").paths_and_sound(1)[0]
    Path(between).write_bytes(b"x")
    data.check("avqa", "avqa", SIZE)
    assert f"{between} is no readable jpg or png" in capsys.readouterr().out


def test_check_shows_a_class_without_clips(roots, capsys):
    """A misspelt class of Annotations.txt makes the head wider, though no clip has it."""
    with open("ave/Annotations.txt", "a") as file:
        file.write("Gaot&x_9&good&0&10\n")
    data.check("ave", "ave", SIZE)
    assert "Gaot: train 0 (0 s), val 0 (0 s), test 0 (0 s)\n" in capsys.readouterr().out


@parametrize("seconds", [0.5, 0.3])
def test_a_clip_shorter_than_a_second_has_its_one_frame(roots, seconds):
    """The first second has sound, the rest is silent, and the frame is that of all of them."""
    shutil.rmtree("ave/video_frames/x_1")
    write_video("ave", "x_1", [50], noise(1)[: int(16000 * seconds)])
    frames = data.AVEDataset("ave", "train", SIZE, STATS)[0][0]
    assert grey_of(frames) == [50] * 10


@needs_ffmpeg
def test_a_sound_without_pictures_is_named(roots, capsys):
    """ffmpeg's own line would advise a "?" in its map."""
    os.mkdir("sounds")
    shutil.copy("ave/raw_audio/x_1.wav", "sounds/a.wav")
    assert data.extract("sounds", "out") == 1
    assert "a.wav has no pictures\n" in capsys.readouterr().out


def test_check_shows_classes_and_shared_videos(roots, capsys):
    """The clips and seconds of each class in each split; a misspelt class is seen in its row.

    Nothing else would tell of the same list for training and test.
    """
    Path("ave/Annotations.txt").write_text(AVE_ROWS + "Curch bell&x_1&good&1&2\n")
    Path("ave/trainSet.txt").write_text("Frying (food)&x_1&good&0&10\nCurch bell&x_1&good&1&2\n")
    Path("ave/valSet.txt").write_text("Church bell&-a b.c&good&2&4\nFrying (food)&x_1&good&3&5\n")
    Path("ave/testSet.txt").write_text("Church bell&-a b.c&good&2&4\n")
    assert data.check("ave", "ave", SIZE) == 0
    printed = capsys.readouterr().out
    assert "Frying (food): train 1 (10 s), val 1 (2 s), test 0 (0 s)" in printed
    assert "Curch bell: train 1 (1 s), val 0 (0 s), test 0 (0 s)" in printed
    assert "train and val share 1 videos, x_1 for example" in printed
    assert "val and test share 1 videos, -a b.c for example" in printed
    assert "train and test share" not in printed


def test_statistics_are_the_means_of_the_seconds_means_and_stds(roots):
    """Against Kaldi's fbank of each second, without the rows that pad an image. A video counts
    once, however many rows name it.
    """
    loudness = np.linspace(0.1, 1, 10).repeat(16000)
    write_wav("ave/raw_audio/x_1.wav", noise(10) * loudness)
    measured = []
    for video in ("x_1", "-a b.c"):
        for second in read_wav(f"ave/raw_audio/{video}.wav").split(16000):
            image = torchaudio.compliance.kaldi.fbank(
                second[None],
                num_mel_bins=64,
                frame_shift=998.4 / 64,
                window_type="hanning",
                htk_compat=True,
            )
            measured.append((image.mean(), image.std()))
    data.measure_stats("ave", "ave", 64)
    assert np.allclose(data.find_stats("ave", "ave", 64), np.mean(measured, 0), atol=1e-4)


@parametrize(
    "task, size, said",
    [
        ("ave", 32, ""),
        ("ave", 48, "data.py stats ave ave --size 48\n"),
        ("ave", 192, "data.py stats ave ave --size 192\n"),
        ("avs", 192, "data.py stats avs avs --size 192\n"),
        ("avqa", 48, "data.py stats avqa avqa --size 48\n"),
        ("ucf101", 48, "data.py stats ucf101 ucf101 --size 48\n"),
    ],
)
def test_statistics_of_other_data_are_used_but_said(roots, capsys, task, size, said):
    """Its own ones are taken silently; others in one line with the cure.

    With the wrong ones all spectrograms are too bright or too dark, and nothing else tells.
    """
    wanted = [-3, 2] if size == 32 else [*STATS]
    assert data.DATASETS[task](task, "test", size).stats == wanted
    printed = capsys.readouterr().out
    assert printed.endswith(said)
    assert printed.count("\n") == said.count("\n")


def test_aves_own_statistics_hold_for_aves_classes_alone(capsys):
    """At 192 pixels. They are known by name, whatever the folder of the data is."""
    classes = data.AVE_CLASSES.split("; ")
    assert len(classes) == 28
    released = [-4.984795570373535, 3.7079780101776123]  # AVE/dataloader.py:84-85
    assert data.find_stats("none", "ave", 192, classes) == released
    assert capsys.readouterr().out == ""
    data.find_stats("none", "ave", 192, classes[:-1])
    data.find_stats("none", "ave", 224, classes)
    assert capsys.readouterr().out.count("no statistics") == 2


def test_check_counts_no_split_that_it_cannot_read(roots, capsys):
    """Its list is the fault; the others are read all the same."""
    os.remove("ave/valSet.txt")
    assert data.check("ave", "ave", SIZE) == 1
    printed = capsys.readouterr().out
    assert re.findall("^(.*): 3 items$", printed, re.MULTILINE) == ["train", "test"]
    assert printed.endswith("\nMend these 1 before training.\n")


def test_check_counts_all_clips_and_seconds_of_a_class(roots, capsys):
    """Also where a data set has no list of its classes."""
    Path("ave/trainSet.txt").write_text(AVE_ROWS.replace("0&0", "5&6"))
    data.check("ave", "ave", SIZE)
    assert "Church bell: train 2 (3 s), val 2 (2 s), test 2 (2 s)\n" in capsys.readouterr().out
    data.check("avs", "avs", SIZE)
    assert "tabla: train 1 (5 s), test 1 (5 s)\n" in capsys.readouterr().out
    data.check("avqa", "avqa", SIZE)
    assert "yes: train 1 (10 s), test 1 (10 s)\n" in capsys.readouterr().out
    data.check("ucf101", "ucf101", SIZE)
    assert "Bell: train 0 (0 s), val 1 (8 s), test 1 (8 s)\n" in capsys.readouterr().out


def test_a_fault_of_a_video_and_missing_statistics_are_said_once(roots, capsys):
    """Not for each question on the video, and not for each split."""
    os.remove("avqa/video_frames/sa2/14.jpg")
    Path("avqa/avqa-val.json").write_text(AVQA_QUESTIONS)
    os.remove("avqa/raw_audio/sa2.wav")
    data.check("avqa", "avqa", SIZE)
    printed = capsys.readouterr().out
    assert printed.count("no sound at avqa/raw_audio/sa2.wav") == 3  # one a split
    assert printed.count("no statistics") == 1
    assert "InputError" not in printed


def test_silence_is_not_measured(roots):
    """Clips without sound would darken the mean; with none that has sound there is no mean."""
    path = Path("ucf101/trainlist01.txt")
    path.write_text(path.read_text().replace("_g24_", "_g09_"))
    write_video("ucf101", "v_Bell_g09_c01", range(0, 128, 4), noise(4))
    os.remove("ucf101/raw_audio/v_Bell_g09_c01.wav")
    both = data.measure_stats("ucf101", "ucf101", SIZE)
    path.write_text("Act/v_aCT_g08_c01.avi 1\n")
    assert data.measure_stats("ucf101", "ucf101", SIZE) == both
    os.remove("ucf101/raw_audio/v_aCT_g08_c01.wav")
    refuses("no training clip of ucf101 has sound", data.measure_stats, "ucf101", "ucf101", SIZE)


# ---------------------------------------------------------------- files


class Evil:
    """A pickle that touches a file when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("owned"),)


def test_a_checkpoint_cannot_run_code():
    """The one class that is let in is argparse.Namespace, in which VideoMAE keeps its settings.

    torch.load without weights_only runs what a stranger wrote.
    """
    torch.save({"model": torch.ones(1), "args": argparse.Namespace(lr=1)}, "mae.pth")
    assert data.load_tensors("mae.pth")["model"] == 1
    torch.save({"settings": Evil()}, "evil.pt")
    refuses("evil.pt is no checkpoint", data.load_tensors, "evil.pt")
    assert not Path("owned").exists()


@parametrize(
    "content, fault",
    [
        (b'\x38\0\0\0\0\0\0\0{"a": {"dtype": "F32"', "a safetensors file"),
        (b'\x20\0\0\0\0\0\0\0{"a": {"dtype": "F32"', "a safetensors file"),
        (b"\n<!DOCTYPE html><html>", "a web page; delete it and start again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "git lfs pull"),
        (b"PK\3\4 and no end", r"it is cut, .* delete it, start again; it begins with b'PK"),
        (b"\x80\2\x8a", "cut, or no file of torch.save: delete it, start again"),
        (b"GIF89a", "begins with b'GIF89a'"),
        (b"", "begins with b''"),
    ],
)
def test_a_file_that_holds_no_tensors_is_named_for_what_it_is(content, fault):
    """By its first bytes. What torch.load says of it is of opcodes, with codes of colours, and
    advises what cannot help.
    """
    Path("weights.pth").write_bytes(content)
    refuses(f"weights.pth is no checkpoint: .*{fault}", data.load_tensors, "weights.pth")


def test_a_class_that_blocks_a_checkpoint_is_named():
    """A NumPy scalar beside the weights, say; and a checkpoint that was cut off is."""
    torch.save({"model": torch.ones(1), "best": np.float64(0.5)}, "best.pth")
    refuses(
        r"best.pth .* holds a numpy\S+scalar, .*weights_only=False", data.load_tensors, "best.pth"
    )
    torch.save({"model": torch.ones(1000)}, "cut.pth")
    os.truncate("cut.pth", 2000)
    refuses("cut.pth .* it is cut, or .* delete it", data.load_tensors, "cut.pth")


def test_a_file_is_on_the_disk_before_its_name_is(monkeypatch):
    """All of it is handed over before fsync, which knows nothing of Python's buffer."""
    sizes = []

    def spy(descriptor):
        sizes.append(os.fstat(descriptor).st_size)
        assert not os.path.exists("a")

    monkeypatch.setattr(os, "fsync", spy)
    data.write_lines(["four"], "a")
    assert sizes == [5]


def test_a_wav_that_is_too_loud_is_clipped():
    """Where 16 bits overflow, the loudest sample would have the other sign."""
    data.write_wav("a.wav", np.array([-2, -1, -0.5, 0.5, 1, 2]))
    with wave.open("a.wav") as file:
        assert file.getparams()[:4] == (1, 2, 16000, 6)
        samples = np.frombuffer(file.readframes(6), "<i2")
    assert np.allclose(samples, [-32767, -32767, -16383, 16383, 32767, 32767], atol=1)


def test_a_checkpoint_that_is_not_there_is_named():
    """With what may be the reason."""
    refuses("no none.pt: wrong path", data.load_tensors, "none.pt")


# ---------------------------------------------------------------- videos


def film(out, *clips, delay=0, more=""):
    """Clips (frames, wav), or (frames,) without sound, one after the other as a video of 25 frames
    a second. The sound starts `delay` seconds after the picture. more: options of ffmpeg.
    """
    command = ["ffmpeg", "-v", "error"]
    streams = f"concat=n={len(clips)}:v=1:a={len(clips[0]) - 1}"
    for frames, *wavs in clips:
        digits = len(Path(frames[0]).stem)
        command += ["-framerate", "1", "-i", f"{Path(frames[0]).parent}/%0{digits}d.jpg"]
        for wav in wavs:
            command += ["-itsoffset", f"{delay}", "-i", wav]
    if delay == 0:
        command += ["-filter_complex", streams]
    command += shlex.split(f"-r 25 -c:v mpeg4 -q:v 1 -c:a aac -b:a 256k {more}")
    subprocess.run([*command, f"file:{out}"], check=True)


def clip_of(root, video):
    """(frames, wav) of a video in a data folder, as film takes them."""
    return data.video_files(root, video)


@needs_ffmpeg
def test_extraction_takes_odd_names_and_names_bad_videos(roots, capsys):
    """A bad video stops no other one; what is done is not done again.

    Ids of YouTube begin with a dash, and ffmpeg takes % for a number. Frames are those of the
    middle of each second, so that their greys tell which seconds came out.
    """
    os.mkdir("my videos")
    frames, wav = clip_of("ave", "x_1")
    film("my videos/-a b.c%d.mp4", (frames, wav))
    film("my videos/mute.mp4", (frames,))
    Path("my videos/broken.mp4").write_bytes(b"no video")
    assert data.extract("my videos", "out") == 1
    printed = capsys.readouterr().out
    assert "mute.mp4 has no sound\n" in printed
    assert "broken.mp4 wants pictures and sound that ffmpeg can read" in printed
    extracted, _ = clip_of("out", "-a b.c%d")
    greys = grey_of(data.read_frames(extracted, SIZE))
    assert np.allclose(greys, range(10, 210, 20), atol=3)

    os.truncate("my videos/-a b.c%d.mp4", 0)
    data.extract("my videos", "out")
    assert "1 of 3 videos are in out" in capsys.readouterr().out

    shutil.rmtree("out/video_frames")  # a sound from elsewhere is no video that is done
    data.extract("my videos", "out")
    printed = capsys.readouterr().out
    assert "-a b.c%d.wav is there without out/video_frames/-a b.c%d; move it away" in printed
    assert "0 of 3 videos are in out" in printed


KILLED = """
import os, pathlib, signal, subprocess, data


def die_half_way(*_, cwd=".", **more):
    pathlib.Path(cwd, "0001.jpg").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


{place} = die_half_way
data.extract_video("a.mp4", "out")
"""


@needs_ffmpeg
@parametrize("place", ["subprocess.run", "os.replace"])
def test_a_killed_extraction_leaves_nothing_half_done(roots, monkeypatch, place):
    """kill -9 in ffmpeg, or before what it wrote is moved; then the same command again.

    Half a frame folder would pass for a short video ever after. The killed process is started
    afresh: a fork of this one would wait forever for the threads that torch has here.
    """
    film("a.mp4", clip_of("ave", "x_1"))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    process = subprocess.run([sys.executable, "-c", KILLED.replace("{place}", place)])
    assert process.returncode == -signal.SIGKILL
    data.extract_video("a.mp4", "out")
    assert sorted(path.name for path in Path("out").glob("*/*")) == ["a", "a.wav"]
    assert len(clip_of("out", "a")[0]) == 10


@needs_ffmpeg
def test_sound_that_starts_late_keeps_its_place(roots):
    """Silence is put before it, so that second t of the sound is second t of the picture.

    ffmpeg moves it to the front unless told, and all labels are against the wrong sound.
    """
    frames, wav = clip_of("ave", "x_1")
    write_wav(wav, noise(7))
    film("-late.mkv", (frames, wav), delay=3)
    data.extract_video("-late.mkv", "out")
    heard = read_wav("out/raw_audio/-late.wav")
    assert heard[:46000].abs().max() < 0.01
    assert np.corrcoef(heard[48000:150000], read_wav(wav)[:102000])[0, 1] > 0.9


def half(content):
    """The first half."""
    return content[: len(content) // 2]


def hole(content):
    """Zeros in place of the middle."""
    length = len(content) // 10
    return content[: 4 * length] + bytes(2 * length) + content[6 * length :]


@needs_ffmpeg
@parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
@parametrize("damage", [half, hole])
def test_a_video_that_is_cut_or_damaged_is_named(roots, capsys, name, damage):
    """Half of it, or a hole in its middle: a fault where frames or sound are missing, else what
    ffmpeg says of it is printed.

    ffmpeg takes half a video for a shorter one, and it counted as done without a word.
    """
    os.mkdir("videos")
    noisy = np.random.default_rng(0).integers(0, 256, (10, 96, 96), np.uint8)
    for number, picture in enumerate(noisy, 1):
        Image.fromarray(picture).save(f"ave/video_frames/x_1/{number}.jpg")
    film(f"videos/{name}", clip_of("ave", "x_1"), more="-movflags +faststart")
    assert data.extract("videos", "whole") == 0
    assert name not in capsys.readouterr().out
    path = Path("videos", name)
    path.write_bytes(damage(path.read_bytes()))
    code = data.extract("videos", "out")
    printed = capsys.readouterr().out
    if code == 1:
        assert re.search(
            rf"{name} has \d frames, one a second, \d+.\d s of sound and.* \d+.\d s", printed
        )
        assert not Path("out/raw_audio/a.wav").exists()
        assert os.listdir("out/video_frames") == []
    else:
        assert damage is hole
        assert f"{name} is extracted, but ffmpeg says: [" in printed
        assert len(clip_of("out", "a")[0]) == 10


@needs_ffmpeg
def test_a_video_that_cannot_be_extracted_says_why(roots, capsys):
    """Too short for a frame, sound that ends long before the picture, a name that no list of IDs
    can hold.

    After "wants pictures and sound that ffmpeg can read:" there was nothing.
    """
    os.mkdir("videos")
    frames, wav = clip_of("ave", "x_1")
    film("videos/short.mp4", (frames, wav), more="-t 0.2")
    write_wav("short.wav", noise(7))
    film("videos/silent.mkv", (frames, "short.wav"))
    shutil.copy("videos/short.mp4", b"videos/caf\xe9.mp4")
    assert data.extract("videos", "out") == 1
    printed = capsys.readouterr().out
    assert re.search(r"short.mp4 is too short for one frame a second: it lasts 0.\d s", printed)
    assert re.search(r"silent.mkv has \d+ frames, one a second, 7.\d s of sound", printed)
    assert "caf?.mp4: its name is not UTF-8" in printed
    assert "0 of 3 videos" in printed


def test_without_ffmpeg_one_line_says_to_install_it(monkeypatch):
    """Nothing is written then.

    It is the one thing that pip does not bring.
    """
    monkeypatch.setenv("PATH", "")
    refuses("install ffmpeg", data.extract_video, "a.mp4", "out")
    assert not os.listdir()


@parametrize(
    "header, stream, wanted",
    [
        ({"duration": "20.0"}, {}, 20),
        ({}, {}, 0),  # a pipe's
        ({"format_name": "avi", "duration": "12.0"}, {"nb_frames": "500"}, 20),
        ({"format_name": "avi", "duration": "20.0"}, {"nb_frames": "250"}, 20),
        ({"format_name": "avi", "duration": "20.0"}, {}, 20),
        (
            {"format_name": "avi", "duration": "20.0"},
            {"nb_frames": "9", "avg_frame_rate": "0/0"},
            20,
        ),
        ({"duration": "20.0"}, {"nb_frames": "750"}, 20),
    ],
)
def test_a_header_promises_a_length(monkeypatch, header, stream, wanted):
    """Its duration, and in an avi, of which a cut shortens the duration, its number of frames."""
    header = {"format_name": "mp4", **header}
    stream = {"time_base": "1/25", **stream}
    answer = json.dumps({"format": header, "streams": [stream]})
    monkeypatch.setattr(subprocess, "check_output", Mock(return_value=answer))
    assert data.promised_length("a.avi") == wanted


@parametrize(
    "count, seconds, promised, fault",
    [
        (10, 10.8, 10, None),
        (9, 9.2, 10, None),
        (1, 1, 1, None),
        (11, 10, 10, None),
        (10, 10, 0, None),  # a header without a length
        (10, 11.2, 10, "10 frames, one a second, 11.2 s of sound"),
        (10, 8.8, 10, "10 frames, one a second, 8.8 s of sound"),
        (12, 10, 10, "12 frames"),
        (8, 10, 10, "8 frames"),
        (5, 5, 10, "by its header, 10.0 s"),
        (0, 0.3, 0.3, "too short for one frame a second: it lasts 0.3 s"),
    ],
)
def test_frames_and_sound_are_as_long_as_the_header_says(
    monkeypatch, count, seconds, promised, fault
):
    """Up to a second, which is less than a video loses that is cut."""
    write_video("out", "a", range(count), noise(seconds))
    folder = Path("out/video_frames/a")
    folder.mkdir(parents=True, exist_ok=True)
    os.rename("out/raw_audio/a.wav", folder / "sound.wav")
    monkeypatch.setattr(data, "promised_length", Mock(return_value=promised))
    done = Mock(stderr="", returncode=0)  # of an ffmpeg that has written these files
    monkeypatch.setattr(subprocess, "run", Mock(return_value=done))
    if fault:
        refuses(fault, data.run_ffmpeg, "a.mp4", str(folder))
    else:
        data.run_ffmpeg("a.mp4", str(folder))


def test_what_ffmpeg_says_may_be_no_utf8(tmp_path, monkeypatch):
    """It prints names and tags of a video as they are."""
    Path("ffmpeg").write_text("#!/bin/sh\nprintf 'tag \\351' >&2\nexit 1\n")
    os.chmod("ffmpeg", 0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    refuses("a.mp4 wants pictures and sound.*tag", data.extract_video, "a.mp4", "out")
    assert os.listdir("out/video_frames") == []


def test_an_extraction_that_was_stopped_before_its_last_step_takes_that_step():
    """The sound lies among the frames until both are there: nothing else is left to do."""
    write_video("out", "a", [0], noise(1))
    os.rename("out/raw_audio/a.wav", "out/video_frames/a/sound.wav")
    assert data.extract_video("a.mp4", "out") == "a"
    assert os.listdir("out/raw_audio") == ["a.wav"]
    assert os.listdir("out/video_frames/a") == ["1.jpg"]


def test_frames_without_their_sound_are_not_overwritten():
    """They are no work of `extract`, which moves both or none. It needs no video to see that."""
    os.makedirs("out/video_frames/a")
    refuses("out/video_frames/a is there without", data.extract_video, "a.mp4", "out")


def test_videos_of_one_name_are_refused(capsys):
    """The ID is the name without its ending: one would stand for the other."""
    os.mkdir("videos")
    for name in ("a.mp4", "a.avi", ".DS_Store"):
        Path("videos", name).write_bytes(b"")
    assert data.extract("videos", "out") == 1
    printed = capsys.readouterr().out
    assert printed.count("another file has the same name") == 2
    assert "0 of 2 videos are in out" in printed


# ---------------------------------------------------------------- settings


def settings_of(monkeypatch, line):
    """What train.py would run with."""
    loop = Mock()
    monkeypatch.setitem(train.LOOPS, line.split()[0], loop)
    main(line)
    settings, _ = loop.call_args.args
    return settings


@parametrize(
    "task, wanted",
    [
        ("ave", "large 192 px, adapters 2/8/2, batch 2, lr 5e-06 4e-06, epochs 50/5"),
        ("avs", "large 192 px, adapters 16/4/2, batch 4, lr 0.0001 0.0001, epochs 30/0"),
        ("avqa", "large 192 px, adapters 16/4/2, batch 1, lr 8e-05 8e-05, epochs 30/5"),
        ("ucf101", "videomae 224 px, adapters 2/4/2, batch 4, lr 0.0001 0.001, epochs 20/0"),
    ],
)
def test_real_data_gets_the_supplementarys_numbers(roots, monkeypatch, task, wanted):
    """Latents, reduction, groups; the rates of adapters and head. Epochs and patience are the
    release's.

    The table says what the paper says; whoever changes a recipe has to change it here too.
    """
    monkeypatch.setattr(train, "make_weights", str)
    monkeypatch.setattr(train, "load_weights", Mock())
    weights = "--weights=none" if task == "ucf101" else ""
    s = settings_of(monkeypatch, f"{task} --data={task}/ {weights}")
    assert s.out == f"runs/{task}"
    assert (s.channels, s.hidden, s.moments) == (256, 512, 10)
    assert not (s.linear_decay or s.first_second or s.one_direction or s.tpavi)
    adapters = f"adapters {s.latents}/{s.reduction}/{s.groups}"
    numbers = f"batch {s.batch_size}, lr {s.lr} {s.head_lr}, epochs {s.epochs}/{s.patience}"
    assert f"{s.backbone} {s.image_size} px, {adapters}, {numbers}" == wanted


@parametrize(
    "line, fault",
    [
        ("ave --backbone=huge", "unknown backbone 'huge'"),
        ("ave --reduction=7", "no multiple of reduction 7"),
        ("ave --backbone=resnet_nano --image-size=36", "36 is no multiple of 16"),
        ("ave --modality=v --compile", "of both streams"),
        ("ave --modality=a --checkpoint-activations", "of both streams"),
        ("eval a b", "eval takes one path or task, not also .'b'"),
        ("bench ave film.mp4", "bench takes one path or task, not also"),
        ("ave --epochs=0", "--epochs must be at least 1"),
        ("ave --batch-size=0", "--batch-size must be at least 1"),
        ("ave --reduction=0", "--reduction must be at least 1"),
        ("ave --groups=0", "--groups must be at least 1"),
        ("avs --channels=0", "--channels must be at least 1"),
        ("avqa --hidden=0", "--hidden must be at least 1"),
        ("avqa --moments=0", "--moments must be at least 1"),
        ("bench ave --repeat=0", "--repeat must be at least 1"),
        ("ave --lr=-1", "--lr must be at least 0"),
        ("ave --seed=9999999999999999999", "--seed must be at least 0 and below"),
        ("ave --device=meta", "--device meta cannot be used"),
        ("ave --weights=toy --backbone=tiny", "--weights toy are for nano"),
        ("avs --channels=12", "--channels must be a multiple of 8"),
        ("avs --channels=-8", "--channels must be at least 1"),
        ("avqa --hidden=6", "--hidden must be a multiple of 4"),
        ("ave --backbone=vit_tiny --image-size=-32", "--image-size must be at least 0"),
        ("avs --backbone=vit_tiny", "segmentation needs"),
        ("ave --backbone=videomae_nano", "(?i)videomae"),
        ("ave --backbone=vit_tiny --weights=imagenet", "no published weights"),
        ("ave --backbone=large --weights=imagenet --image-size=384", "are for 192 px"),
        ("ave --resume", "runs/ave/state.pt"),
        ("ucf101 --data=.", "--weights must be given"),
        ("ave --data=mispelt", "there is no mispelt"),
        ("eval none", "none/adapters.pt"),
        ("eval", "eval of what"),
        ("ave run", "ave takes no .'run'.; options begin with --"),
        ("bench flute", "bench takes a task: ave, avs"),
    ],
)
def test_what_cannot_work_is_refused_before_a_toy_is_made(capsys, monkeypatch, line, fault):
    """In one line that says what to change.

    Making a toy and pretraining take a minute: too long to learn of a misspelt name. In this test
    it fails at once.
    """
    monkeypatch.setattr(data, "make_toy", disk_is_full)
    assert re.search(fault, one_line_error(capsys, line))


def disk_is_full(*_):
    """In place of a call that writes."""
    raise OSError(28, "No space left on device")


FACTS = {"classes": "abcd", "mask_size": 32, "vocabulary": {"words": "abc", "answers": "abc"}}


@parametrize(
    "task, option, tensor, shape",
    [
        ("ave", "--latents=3", "net.audio_adapters.0.0.latents", (3, 32)),
        ("ave", "--reduction=4", "net.audio_adapters.0.0.bn_down.weight", (8,)),
        ("ave", "--groups=1", "net.audio_adapters.0.0.down.0.weight", (4, 32)),
        ("ave", "--modality=v", "net.adapters.0.0.gate", (1,)),
        ("ave", "--modality=v --reduction=4", "net.adapters.0.0.down.0.weight", (4, 16)),
        ("ave", "--modality=v --groups=1", "net.adapters.0.0.down.0.weight", (4, 32)),
        ("ave", "--one-direction", "net.audio_adapters.0.0.latents", None),
        ("ave", "--extra-audio=vggish.npy", "head.0.weight", (512, 2 * 128 + 128)),
        ("avs", "--tpavi", "tpavi.0.theta.weight", (32, 64)),
        ("avs", "--channels=32", "fuse.0.conv1.weight", (32, 32, 3, 3)),
        ("avqa", "--hidden=64", "answer.weight", (3, 64)),
    ],
)
def test_an_option_changes_what_it_names(toys, monkeypatch, task, option, tensor, shape):
    """The tensor has another shape without the option, or is not there.

    Two options that change places would both change the net.
    """
    shapes = []
    for more in ("", option):
        settings = settings_of(monkeypatch, f"{task} --data={toys}/{task} {more}")
        model = train.add_head(settings, FACTS, train.make_net(settings))
        trained_ones = {name: tuple(p.shape) for name, p in model.named_parameters()}
        shapes.append(trained_ones.get(tensor))
    assert shapes[1] == shape != shapes[0]


def test_modality_recomputation_and_compilation_reach_the_net(toys, monkeypatch):
    """What has no shape: which stream is alone, what is recomputed, what is compiled."""
    line = f"ave --data={toys}/ave"
    for modality in "va":
        settings = settings_of(monkeypatch, f"{line} --modality={modality}")
        assert train.make_net(settings).modality == modality
    assert train.make_net(settings_of(monkeypatch, line)).run_block is lavish.lavish_block
    settings = settings_of(monkeypatch, f"{line} --checkpoint-activations")
    recomputed = train.make_net(settings).run_block
    assert recomputed.func is checkpoint and recomputed.args == (lavish.lavish_block,)
    monkeypatch.setattr(torch, "compile", Mock(return_value="compiled"))
    settings = settings_of(monkeypatch, f"{line} --compile")
    assert train.make_net(settings).run_block == "compiled"
    torch.compile.assert_called_with(lavish.lavish_block)


def test_avqa_has_the_published_rates(toys, monkeypatch):
    """A rate of its own, 3e-6, for "the grounding modules and the final prediction layer"
    (supplementary); one for the rest of the head, and one for the adapters.
    """
    assert train.PAPER["avqa"].grounding_lr == 3e-6
    settings = settings_of(monkeypatch, f"avqa --data={toys}/avqa")
    model = train.add_head(settings, FACTS, train.make_net(settings))
    rates = {}
    for group in train.make_optimizer(model).param_groups:
        for parameter in group["params"]:
            rates[parameter] = group["rate_name"]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[parameter] == rate_of(name, "avqa")


RATES = {"net": "lr"}
RATES.update(dict.fromkeys(("embedding", "lstm", "question"), "head_lr"))
RATES.update(dict.fromkeys(("audio_in", "visual_in", "fusion"), "head_lr"))


def rate_of(name, task):
    """The setting that is the learning rate of a parameter; AVQA's head has two of them."""
    module = name.split(".")[0]
    return RATES.get(module, "grounding_lr" if task == "avqa" else "head_lr")


@parametrize("task", ["ave", "avqa"])
def test_a_run_in_bf16_is_close_to_one_in_fp32(toys, capsys, task):
    """And can be scored in fp32.

    The losses of an epoch differ, but by little. CPUs without bf16 instructions have no LSTM in
    it.
    """
    for precision in ("fp32", "bf16"):
        main(f"{task} --data={toys}/{task} --epochs=1 --precision={precision} --out={precision}")
    difference = abs(losses("fp32")[0] - losses("bf16")[0])
    assert 1e-6 < difference < 0.02
    main("eval bf16 --precision=fp32")


def test_without_data_a_toy_is_made_and_has_the_toys_recipe(toys, monkeypatch):
    """As the first command of the README does it; the paper's rates would learn nothing."""

    def make_toy(task, folder):
        shutil.copytree(toys / task, folder)
        shutil.copy(toys / "nano.pt", f"{folder}/../nano.pt")

    monkeypatch.setattr(data, "make_toy", make_toy)
    wanted = train.replace(train.TOY["avs"], data="toy/avs", out="runs/avs", image_size=SIZE)
    assert settings_of(monkeypatch, "avs") == wanted
    assert os.listdir("toy/avs")


@parametrize("option", ["--precision=fp16", "--modality=x", "--epochs=1.5", "--unknown=1"])
def test_an_option_of_a_wrong_form_is_refused(capsys, option):
    """By argparse. With fp16 a run would be in fp32 without a word."""
    with pytest.raises(SystemExit) as stop:
        main(f"ave {option}")
    assert stop.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err
    assert os.listdir() == []


def test_a_device_that_torch_was_not_built_for_is_refused(monkeypatch):
    """A torch for CPUs alone says so by an AssertionError, others by a RuntimeError."""
    zeros = Mock(side_effect=AssertionError("Torch not compiled with CUDA enabled"))
    monkeypatch.setattr(torch, "zeros", zeros)
    fault = "--device cuda cannot be used: Torch not compiled"
    refuses(fault, train.settings_of, train.TOY["ave"], {"device": "cuda"})


def test_matrix_products_of_a_gpu_are_in_tf32(monkeypatch):
    """In every command, as the release had it."""
    monkeypatch.setattr(train, "report", Mock())
    torch.set_float32_matmul_precision("highest")
    main("report a")
    assert torch.get_float32_matmul_precision() == "high"


def test_an_error_of_a_process_that_reads_clips_is_one_line_too(toys, capsys):
    """It comes with a trace of that process."""
    shutil.copytree(toys / "ave", "mine")
    shutil.copy(toys / "nano.pt", "nano.pt")
    frames = sorted(Path("mine/video_frames").glob("train*"))
    for path in [*frames[0].iterdir()]:
        path.write_bytes(b"x")
    error = one_line_error(capsys, "ave --data=mine --workers=1 --out=run")
    assert error.startswith(f"train.py: {frames[0]}")
    assert not Path("run").exists()


def test_help_prints_every_setting(capsys):
    """And the commands: it is all that a person has who does not read the file."""
    with pytest.raises(SystemExit) as stop:
        main("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert train.__doc__.strip() in printed
    assert inspect.getsource(train.Settings).strip() in printed


# ---------------------------------------------------------------- the loops


def bernoulli(p, truth):
    """Cross-entropy of probabilities, each for itself."""
    return -torch.distributions.Bernoulli(p).log_prob(truth).mean()


def categorical(logits, labels):
    """Cross-entropy of one class among others."""
    return -torch.distributions.Categorical(logits=logits).log_prob(labels).mean()


def ave_loss(logits, batch):
    """Each class for itself, as released; cross_entropy looks at the true class alone."""
    truth = torch.eye(logits.shape[-1])[batch[-1]]
    return bernoulli(logits.softmax(-1), truth)


def avs_loss(logits, batch):
    """Each pixel for itself."""
    return bernoulli(logits.sigmoid(), batch[-1])


def avqa_loss(outputs, batch):
    """Half of the frames, the first ones, go with the sound."""
    logits, match = outputs
    own, other = match.chunk(2)
    match_loss = categorical(own, torch.tensor(1)) + categorical(other, torch.tensor(0))
    return categorical(logits, batch[-1]) + 0.5 * match_loss / 2


def ucf101_loss(logits, batch):
    """The action, one of all."""
    return categorical(logits, batch[-1])


def spy_batches(monkeypatch):
    """The list of the training batches from now on."""
    batches = []

    def progress(loader, text):
        for batch in loader:
            if text == "train":
                batches.append(batch)
            yield batch

    monkeypatch.setattr(train, "progress", progress)
    return batches


LOSSES = [("ave", ave_loss), ("avs", avs_loss), ("avqa", avqa_loss), ("ucf101", ucf101_loss)]


@parametrize("task, loss_by_hand", LOSSES)
def test_losses_are_those_of_the_papers(toys, monkeypatch, task, loss_by_hand):
    """By torch's distributions, on what the model answers to the batches of an epoch.

    A sigmoid in place of AVE's softmax, or AVQA's labels the wrong way round, would still learn
    something.
    """
    batches = spy_batches(monkeypatch)
    answers = []
    head = getattr(lavish, task.upper())
    forward = head.forward

    lengths = []

    def spy(model, *inputs, **more):
        lengths.append(inputs[0].shape[1])
        answers.append(forward(model, *inputs, **more))
        return answers[-1]

    monkeypatch.setattr(head, "forward", spy)
    main(f"{task} --data={toys}/{task} --epochs=1 --batch-size=3 --out=run")
    by_hand = [loss_by_hand(*pair).item() for pair in zip(answers, batches)]
    if task == "avs":  # the toy trains on first seconds
        assert lengths[0] == 1
    assert losses("run") == [pytest.approx(np.mean(by_hand), rel=1e-4)]


def test_five_seconds_of_avs_are_seen_and_the_first_is_scored(toys, monkeypatch):
    """As with real data: the loss by hand, on the first frame of what the net says to all."""
    batches = spy_batches(monkeypatch)
    forward = lavish.AVS.forward
    by_hand = []

    def spy(model, frames, spectrograms, first_only=False):
        assert frames.shape[1] == spectrograms.shape[1] == 5
        logits = forward(model, frames, spectrograms, first_only)
        if first_only:
            by_hand.append(avs_loss(logits, batches[-1]).item())
        return logits

    monkeypatch.setattr(lavish.AVS, "forward", spy)
    main(f"avs --data={toys}/avs --epochs=1 --batch-size=3 --no-first-second --out=run")
    assert losses("run") == [pytest.approx(np.mean(by_hand), rel=1e-4)]


@parametrize("modality, tensors", [("av", 5), ("v", 4)])
def test_negatives_come_with_the_seed_and_with_both_streams(toys, monkeypatch, modality, tensors):
    """One stream alone has nothing to match. What the words alone say is kept for the test."""
    batches = spy_batches(monkeypatch)
    negatives = Mock(wraps=data.NegativeFrames)
    monkeypatch.setattr(data, "NegativeFrames", negatives)
    main(f"avqa --data={toys}/avqa --modality={modality} --seed=5 --epochs=1 --out=run")
    assert {len(batch) for batch in batches} == {tensors}
    assert [call.args[1] for call in negatives.call_args_list] == [5] * (tensors - 4)
    items = data.MusicAVQADataset(f"{toys}/avqa", "train", SIZE)
    settings, _, model = train.open_run("run", {})
    assert result("run")["gflop"] == train.count_gflop(settings, model)
    guesses = torch.load("run/adapters.pt")["facts"]["guesses"]
    assert guesses == train.commonest_answers(items.questions)
    assert result("run")["scores"]["from the words of the question alone"] > 0


@parametrize("task", ["ave", "avs", "avqa", "ucf101"])
def test_no_net_that_diverges_is_kept_or_scored(toys, capsys, monkeypatch, task):
    """Each loop ends at the first step; so does whatever looks at a clip."""
    head = getattr(lavish, task.upper())
    forward = head.forward

    steps = []

    def diverge(model, *inputs, **more):
        outputs = forward(model, *inputs, **more)
        if not model.training:
            return outputs
        steps.append(inputs)
        if task == "avqa":
            return outputs[0] * np.nan, outputs[1]
        return outputs * np.nan

    monkeypatch.setattr(head, "forward", diverge)
    line = f"{task} --data={toys}/{task} --epochs=1 --batch-size=1 --out=run"
    assert "the net's output is not finite" in one_line_error(capsys, line)
    assert len(steps) == 1
    logits = torch.full((1, 3), np.nan)
    answers = (logits, None) if task == "avqa" else logits
    settings = train.Settings(task, device="cpu")
    refuses("not finite", train.logits_of, settings, Recited(answers), [IMAGES])


def test_a_split_is_opened_by_the_facts_of_training(toys):
    """Its moments and words; another size of masks is refused."""
    settings = train.Settings("avqa", data=f"{toys}/avqa", image_size=SIZE, moments=3)
    vocabulary = train.open_split(settings, "train").vocabulary
    turned = {**vocabulary, "words": vocabulary["words"][::-1]}
    items = train.open_split(settings, "test", {"vocabulary": turned})
    assert items.vocabulary == turned
    assert len(items[0][0]) == 3
    settings = train.Settings("avs", data=f"{toys}/avs", image_size=SIZE)
    refuses("test has other mask_size", train.open_split, settings, "test", {"mask_size": 16})


def test_pretraining_moves_the_weights_and_scores_in_evaluation_mode(monkeypatch):
    """The accuracy that is printed is that of running statistics."""
    modes = []

    def spy(backbone, images):
        modes.append(backbone.training)
        return lavish.frozen_forward(backbone, images)

    monkeypatch.setattr(lavish.ResNet, "forward", spy)
    torch.manual_seed(0)
    start = lavish.make_backbone("resnet_nano").state_dict()
    torch.manual_seed(0)
    train.pretrain_nano("resnet_nano", "net.pt", steps=2)
    assert modes == [True, True, False]
    assert not torch.equal(torch.load("net.pt")["conv1.weight"], start["conv1.weight"])


@parametrize("task, loss_by_hand", LOSSES)
def test_a_run_is_a_plain_loop(toys, monkeypatch, task, loss_by_hand):
    """Two epochs by another loop, with an Adam for each parameter, have the same losses.

    In the second one every step of the first shows: gradients that are not set to zero, rates that
    do not fall, batch norms that keep their statistics, noise of another seed.
    """
    batches = spy_batches(monkeypatch)
    main(f"{task} --data={toys}/{task} --epochs=2 --batch-size=4 --seed=1 --out=run")
    settings = train.Settings(**result("run")["settings"])
    net = train.make_net(settings)
    train.load_weights(settings, net)
    model = train.add_head(settings, torch.load("run/adapters.pt")["facts"], net)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adams = {name: torch.optim.Adam([p], foreach=False) for name, p in trained.items()}

    in_an_epoch = len(batches) // 2
    by_hand = []
    for step, batch in enumerate(batches):
        epoch, first = divmod(step, in_an_epoch)
        if first == 0:
            torch.manual_seed((1 * 1000 + epoch) * 1000)
        inputs = batch[:-1]
        if task == "avs":
            inputs = [x[:, :1] for x in inputs]
        loss = loss_by_hand(model.train()(*inputs), batch)
        by_hand.append(loss.item())
        model.zero_grad()
        loss.backward()
        for name, adam in adams.items():
            falling = 0.75 if epoch == 0 else 0.25  # a line from 1 to 0, in the middle of the epoch
            adam.param_groups[0]["lr"] = falling * getattr(settings, rate_of(name, task))
            adam.step()
    means = [np.mean(by_hand[:in_an_epoch]), np.mean(by_hand[in_an_epoch:])]
    assert losses("run") == pytest.approx(means, rel=1e-4)


def test_ave_trains_with_features_beside_the_sound(toys):
    """A row of features for each row of Annotations.txt, in each of ten seconds."""
    rows = len(Path(f"{toys}/ave/Annotations.txt").read_text().splitlines()) - 1
    np.save("vggish.npy", np.random.default_rng(0).standard_normal((rows, 10, 128)))
    main(f"ave --data={toys}/ave --epochs=2 --batch-size=4 --extra-audio=vggish.npy --out=run")
    first, second = losses("run")
    assert second < first
    main("eval run")


@parametrize(
    "option, wanted",
    [("--no-linear-decay", [1, 1, 1]), ("--linear-decay", [5 / 6, 0.5, 1 / 6])],
)
def test_the_order_changes_with_the_epoch_and_the_rates_fall(toys, monkeypatch, option, wanted):
    """To zero along a line, or not at all; each epoch has all clips.

    Without set_epoch all epochs of a DistributedSampler are in one order. A batch holds all clips,
    so that its order is that of the epoch.
    """
    batches = spy_batches(monkeypatch)
    rates = []
    step = torch.optim.Adam.step

    def spy(optimizer):
        rates.append([group["lr"] for group in optimizer.param_groups])
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    main(f"ave --data={toys}/ave --epochs=3 --lr=0.1 --head-lr=0.2 --seed=7 --out=run {option}")
    assert np.allclose(rates, np.outer(wanted, [0.1, 0.2]))
    items = data.AVEDataset(f"{toys}/ave", "train", SIZE)
    for epoch, batch in enumerate(batches):
        shuffled = torch.randperm(len(items), generator=torch.Generator().manual_seed(7 + epoch))
        assert_same(batch[0], torch.stack([items[k][0] for k in shuffled]))


def test_clips_are_read_by_at_most_a_process_a_core_and_use_up_no_random_numbers(monkeypatch):
    """Those of dropout follow from the epoch; a loader draws a number whenever it starts."""
    items = torch.arange(4)
    settings = train.replace(train.TOY["ave"], workers=2, batch_size=2)
    for cores, workers in ((1, 1), (8, 2)):
        monkeypatch.setattr(train, "cores", Mock(return_value=cores))
        assert train.make_loader(settings, items, range(4)).num_workers == workers

    train.seed_epoch(settings, 0)
    loader = train.make_loader(train.replace(settings, workers=0), items, range(4))
    before = torch.get_rng_state()
    assert_same(list(loader), [torch.tensor([0, 1]), torch.tensor([2, 3])])
    assert_same(torch.get_rng_state(), before)


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    """A Mac cannot say it: then they are those of the machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert train.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert train.cores() == 64


def test_negatives_are_drawn_anew_in_each_epoch_of_a_run(toys, monkeypatch):
    """The loop tells its epoch to the data set.

    Without that, each frame would be told from the same few others for the whole run.
    """
    batches = spy_batches(monkeypatch)
    main(f"avqa --data={toys}/avqa --epochs=2 --batch-size=9 --out=run")
    first, second = [sorted(batch[3].sum((1, 2, 3, 4)).tolist()) for batch in batches]
    assert first != second


@parametrize("task", ["ave", "avs", "avqa", "ucf101"])
def test_the_best_epoch_on_val_is_kept_and_tested_and_patience_ends_a_run(toys, monkeypatch, task):
    """Scores on val by a script: the second epoch is the first of the best ones, the run ends two
    epochs later.

    The fifth call is the test: with the weights of the second epoch, not of the last one.
    """
    script = iter([0.1, 0.5, 0.5, 0.2, 0.9])
    weights = []
    opened = []  # (split, its data set)
    open_split = train.open_split

    def open_and_note(settings, split, facts=None):
        opened.append((split, open_split(settings, split, facts)))
        return opened[-1][1]

    monkeypatch.setattr(train, "open_split", open_and_note)
    scored = []

    def score(settings, facts, model, loader):
        scored.extend(split for split, dataset in opened if dataset is loader.dataset)
        weights.append(copy.deepcopy(lavish.trained_state_dict(model)))
        return {"mean IoU" if task == "avs" else "accuracy": next(script)}

    monkeypatch.setattr(train, f"evaluate_{task}", score)
    main(f"{task} --data={toys}/{task} --epochs=9 --patience=2 --batch-size=9 --out=run")
    assert scored == ["val", "val", "val", "val", "test"]
    assert_same(trained("run"), weights[1])
    assert_same(weights[4], weights[1])
    assert result("run")["test"] == 0.9


# ---------------------------------------------------------------- scores


IMAGES = torch.zeros(1)  # a net that recites looks at none


class Recited(torch.nn.Module):
    """A net that answers what it was given, batch by batch."""

    def __init__(self, *answers):
        super().__init__()
        self.answers = iter(answers)

    def forward(self, *inputs):
        return next(self.answers)


def recite(task, facts, batches, *answers):
    """The scores of a net that answers so, on batches of (images, images, truth).

    So scores can be worked out by hand, without a net that would have to be trained.
    """
    with patch.object(train, "gather", wraps=train.gather) as gather:
        scores = train.SCORERS[task](train.Settings(task), facts, Recited(*answers), batches)
    # From all processes: what is found and what is true, or of AVS IoU and F score.
    assert gather.call_count == 2
    return scores


@parametrize("patience, enough", [(0, [0, 0, 0, 0]), (1, [0, 0, 1, 1]), (2, [0, 0, 0, 1])])
def test_patience_counts_the_epochs_since_the_best(patience, enough):
    """Of equal ones the first is the best. Before any epoch there is none."""
    settings = train.replace(train.TOY["ave"], patience=patience)
    log = [{"val": 0.5}, {"val": 0.5}, {"val": 0.4}]
    for done, wanted in enumerate(enough):
        assert train.has_waited_enough(settings, log[:done]) == bool(wanted)
        assert train.best_epoch(log[:done]) == min(done, 1)


def test_a_run_with_a_missing_sound_is_refused_before_it_starts(toys, capsys, short_pretraining):
    """Not in the middle of an epoch. The weights of a toy in this folder lie in this folder."""
    shutil.copytree(toys / "ave", "mine")
    wav = sorted(Path("mine/raw_audio").glob("test*.wav"))[-1]
    wav.unlink()
    line = one_line_error(capsys, "ave --data=mine --out=run")
    assert f"1 files are missing: ['{wav}']" in line
    assert not Path("run").exists()
    assert Path("nano.pt").exists()


def test_scores_of_masks_by_hand():
    """Three frames of two pixels: the wanted one and another one, and a frame without a mask.

    The two frames want different thresholds, so that the order of mean and maximum shows.
    """
    p = torch.tensor([[0.9, 0.6], [0.6, 0.3], [0.9, 0.4]])
    masks = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    answers = p.logit().view(3, 1, 1, 1, 2)  # a batch of each
    batches = [(IMAGES, IMAGES, mask.view(1, 1, 1, 2)) for mask in masks]
    scores = recite("avs", {}, batches, *answers)
    # At 0.5 both pixels are found, the right one, and where nothing sounds half is left empty.
    assert train.mask_iou(p.logit(), masks).tolist() == [0.5, 1, 0.5]
    assert scores["mean IoU"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    empty = train.mask_iou(torch.tensor([[1.0, -1.0, -1.0, -1.0]]), torch.zeros(1, 4))
    assert empty.tolist() == [0.75]
    # The best threshold of all lies below 0.6: precision is 0.5 and 1, recall 1. The best one of
    # each frame would give 1; the mean over the thresholds is lower.
    first = 1.3 * 0.5 * 1 / (0.3 * 0.5 + 1)
    assert scores["F score"] == pytest.approx((first + 1) / 2)
    # 255 thresholds from 0 to 1: the right pixel is found by those up to 228.6 and 152.4 / 254.
    assert (train.f_score(p.logit(), masks) > 0).sum(1).tolist() == [229, 153, 0]
    sure = train.f_score(torch.tensor([[100.0, -100.0]]), masks[:1])
    assert (sure > 0).all()  # a sigmoid of 1 reaches the last threshold too
    # The training split has a mask of the first frame alone.
    logits = torch.tensor([[[[1.0, -1.0]], [[-1.0, 1.0]]]])  # (1,2,1,2)
    scores = recite("avs", {}, [(IMAGES, IMAGES, masks[:1].view(1, 1, 1, 2))], logits)
    assert scores["mean IoU"] == 1


class Batches(list):
    """Batches, and the data set that they were made of, as a loader has it."""

    dataset = Mock(
        questions=[
            {"type": ("Audio", "Counting"), "words": ["how", "many"], "answer": "two"},
            {"type": ("Visual", "Location"), "words": ["which"], "answer": "left"},
            {"type": ("Visual", "Counting"), "words": ["new"], "answer": "one"},
        ]
    )


def test_what_the_words_alone_say_is_the_commonest_answer_in_training():
    """By hand: "how many" has two answers "two" and one "one"; "which" has one."""
    asked = [("how many", "one"), ("how many", "two"), ("which", "left"), ("how many", "two")]
    questions = [{"words": text.split(), "answer": answer} for text, answer in asked]
    assert train.commonest_answers(questions) == {"how many": "two", "which": "left"}


def test_scores_of_answers_by_hand():
    """Over all, by type, and what the commonest answers to the words alone would score.

    The second answer is wrong. One question is not in training: there the words say nothing.
    """
    facts = {"guesses": {"how many": "two", "which": "right"}}
    batches = Batches([(IMAGES, IMAGES, IMAGES, torch.tensor([0, 2, 2]))])
    scores = recite("avqa", facts, batches, (torch.eye(3), None))
    assert " ".join(f"{name} {score:.2f}," for name, score in scores.items()) == (
        "accuracy 0.67, from the words of the question alone 0.33, "
        "Audio Counting (1) 1.00, Audio average (1) 1.00, "
        "Visual Counting (1) 1.00, Visual Location (1) 0.00, Visual average (2) 0.50,"
    )


def test_scores_of_events_and_actions_by_hand():
    """AVE counts seconds, UCF101 clips. Of four answers the first and the third are right.

    Half of the seconds are background: one of the right ones, and one of the wrong ones.
    """
    answers = torch.eye(3)[torch.tensor([0, 1, 2, 2])]
    truth = torch.tensor([0, 2, 2, 0])
    facts = {"classes": ["bell", "drum"]}
    scores = recite("ave", facts, [[IMAGES, IMAGES, truth[None]]], answers[None])
    assert list(scores.values()) == [0.5, 0.5]  # accuracy, and that of background everywhere
    assert recite("ucf101", {}, [[IMAGES, IMAGES, truth]], answers) == {"accuracy": 0.5}


# ---------------------------------------------------------------- runs


def test_nano_is_pretrained_where_it_is_missing(toys, short_pretraining):
    """A first run makes it, beside the toy, and loads it. Without --data a run is on the toy.

    Who clones the project has nothing but these files.
    """
    shutil.copytree(toys / "ave", "toy/ave")
    main("ave --epochs=1 --batch-size=4")
    weights = data.load_tensors("toy/nano.pt")
    assert weights.keys() == lavish.make_backbone("nano").state_dict().keys()
    assert result("runs/ave")["settings"]["data"] == "toy/ave"


def test_pretraining_is_the_same_for_every_seed_and_uses_up_none_of_its_numbers(short_pretraining):
    """Else the scores of a first run would differ from those of all later ones."""
    weights = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        train.make_weights(train.replace(train.TOY["ave"], data="toy/ave"))
        assert_same(torch.get_rng_state(), before)
        weights.append(data.load_tensors("toy/nano.pt"))
        os.remove("toy/nano.pt")
    assert_same(*weights)


def test_published_weights_are_downloaded_once(monkeypatch):
    """To where torch.hub keeps them; without a network a line says what to put where."""
    address = f"{lavish.TORCH}/swin_v2_t-b137f0e2.pth"
    path = "hub/checkpoints/swin_v2_t-b137f0e2.pth"
    settings = train.Settings("ave", backbone="tiny", image_size=256)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    monkeypatch.setattr(torch.hub, "download_url_to_file", disk_is_full)
    with pytest.raises(InputError, match=f"cannot fetch {address} .*save it as {path}"):
        train.make_weights(settings)

    download = Mock(side_effect=lambda address, path: Path(path).write_text(address))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    train.make_weights(settings)
    train.make_weights(settings)
    download.assert_called_once_with(address, path)


def test_with_data_of_ones_own_nano_lies_in_toy(toys, short_pretraining, capsys):
    """Not beside the user's folder, and a line says where."""
    shutil.copytree(toys / "ave", "mine/ave")
    os.remove("mine/ave/toy.json")
    line = "ave --data=mine/ave --backbone=nano --weights=toy --epochs=1 --workers=9"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch warns of more workers than processors
        main(line)
    printed = capsys.readouterr().out
    assert "kept in toy/nano.pt" in printed
    assert "takes the toy's recipe" in printed
    assert result("runs/ave")["settings"]["lr"] == train.TOY["ave"].lr
    assert os.listdir("mine") == ["ave"]


@parametrize("task", data.DATASETS)
def test_a_toy_is_learned_and_scored(toys, capsys, task):
    """The loss falls, eval gives the same scores again, within 80 columns.

    A folder that is there is not written to again. Of AVS's training clips one frame has a mask.
    """
    main(f"{task} --data={toys}/{task} --epochs=2 --batch-size=3 --out='a run'")
    assert {*os.listdir("a run")} == {"adapters.pt", "result.json", "test.png"}
    first, second = losses("a run")
    assert second < first
    main("eval 'a run' --split=train")
    main("eval 'a run'")
    text = capsys.readouterr().out
    for name, score in result("a run")["scores"].items():
        assert text.count(f"{name:45} {score:.4f}\n") >= 2
    assert max(map(len, text.split("\n"))) <= 80
    assert "is there already" in one_line_error(
        capsys, f"{task} --data={toys}/{task} --out='a run'"
    )


@needs_ffmpeg
def test_a_film_of_two_clips_gives_the_models_answers_back(toys, capsys, monkeypatch):
    """Second by second, also beyond the ten seconds of a clip.

    The way from a video to an answer has no part in common with the data set's but the net: it
    goes through ffmpeg, 25 frames a second and lossy sound.
    """
    main(f"ave --data={toys}/ave --epochs=1 --out=run")
    settings, facts, model = train.open_run("run", {})
    monkeypatch.setattr(train, "open_run", Mock(return_value=(settings, facts, model)))
    items = data.AVEDataset(f"{toys}/ave", "test", SIZE)
    torch.nn.init.normal_(model.head[1].weight)  # answers that differ from second to second
    inputs = [torch.stack(pair) for pair in zip(items[0][:2], items[1][:2])]
    model.head[1].bias.data -= model(*inputs).mean((0, 1)).detach()
    wanted = model(*inputs).argmax(-1).flatten()

    clips = [items.files(0), items.files(1)]
    film("-a film.mp4", *clips)
    main("predict run './-a film.mp4' --out=new")
    found = re.findall(r"from \d+ s: (\w+)", capsys.readouterr().out)
    names = [*facts["classes"], "background"]
    right = [name == names[k] for name, k in zip(found, wanted)]
    assert len(found) == 20
    assert sum(right) >= 17  # a film loses a little
    assert os.listdir("new")


@needs_ffmpeg
def test_predict_goes_on_after_a_video_that_is_none(toys, capsys):
    """It reports it, and exits with 2 at the end. No run and no video writes another's picture."""
    main(f"ave --data={toys}/ave --epochs=1 --out=run")
    shutil.copytree("run", "other")
    film("a.mp4", data.AVEDataset(f"{toys}/ave", "test", SIZE).files(0))
    Path("bad.mp4").write_text("no film")
    for run in ("run", "other"):
        assert "1 of 3 videos" in one_line_error(
            capsys, f"predict {run} a.mp4 bad.mp4 a.mp4 --out=new"
        )
    shutil.copytree("run", "runs/run")
    os.mkdir("b")
    shutil.copy("a.mp4", "b")
    main("predict runs/run b/a.mp4 --out=new")
    names = ["other-a.mp4-0000.png", "run-a.mp4-0000.png", "runs-run-b-a.mp4-0000.png"]
    assert sorted(os.listdir("new")) == names


def drawn_rows(monkeypatch, line):
    """What a command draws, {name of a row: tiles}, and the size of the picture."""
    draw = Mock(wraps=train.draw)
    monkeypatch.setattr(train, "draw", draw)
    main(line)
    rows, path = draw.call_args.args
    return rows, data.read_image(path).shape


@parametrize("task", ["ave", "avqa", "ucf101"])
def test_look_draws_what_the_latents_of_two_adapters_read(toys, capsys, monkeypatch, task):
    """As bright as the attention: by a loop over latents and seconds, on one adapter.

    The table shuts every gate once and opens it again.
    """
    main(f"{task} --data={toys}/{task} --epochs=1 --batch-size=3 --lr=0.1 --out=run")
    before = trained("run")
    rows, (_, height, _) = drawn_rows(monkeypatch, "look run")
    assert_same(trained("run"), before)
    table = [line for line in capsys.readouterr().out.split("\n") if ", block " in line]
    _, _, model = train.open_run("run", {})
    named = train.adapters_with_latents(model.net)
    assert [line[:38].strip() for line in table] == [*named]
    assert [float(line.split()[-2]) for line in table] == [
        pytest.approx(adapter.gate_av.item(), abs=1e-3) for adapter in named.values()
    ]
    latents = [name for name in rows if "latent" in name]
    assert len(latents) == 4
    assert {"found", "true"} < rows.keys()
    for name in latents:
        shown = rows["frame" if name.startswith("sound") else "sound (time right, pitch up)"]
        # In each second the place that is read most is drawn as it is, all others darker.
        assert (rows[name] <= shown + 1e-6).all()
        assert ((rows[name] - shown).abs() < 1e-6).flatten(1).any(1).all()
    assert height > 116 * (2 + len(latents))


def test_a_long_name_of_a_row_is_drawn_whole():
    """Beside tiles and beside texts: its second line was cut there."""
    train.draw({"a name of a row that is long": ["1", "2"]}, "long.png")
    picture = data.read_image("long.png")
    assert picture.shape == (3, 2 * 28, 190 + 6 * (train.TILE + 4))
    assert picture[:, 28:, :190].min() < 100  # the second line


def test_an_attention_map_is_as_large_as_the_picture_it_is_of():
    """A latent that looks at one corner leaves that corner bright: frames, and sounds turned so
    that time runs right and pitch up.
    """
    net = lavish.Lavish(lavish.make_backbone("nano"))
    model = lavish.AVE(net, 3).eval()
    settings = train.Settings("ave", image_size=32, device="cpu")
    clip = [torch.randn(2, 3, 32, 32), torch.randn(2, 32, 32)]
    # Block 1 has 8 x 8 tokens. Number 7 is the last of the first row: early in time, highest pitch.
    attention = torch.full((2, 2, 64), 0.01)
    attention[:, :, 7] = 0.37
    adapter = net.visual_adapters[0][0]
    adapter.compress = Mock(return_value=(attention, torch.zeros(2, 2, 32)))
    rows = train.rows_of_latents(settings, model, clip, "sight reads sound", adapter)
    assert [*rows] == [f"sight reads sound: latent {k} (23.7 x even)" for k in (1, 2)]
    sound = train.rows_of(clip)["sound (time right, pitch up)"]
    for tiles in rows.values():
        assert_close(tiles[:, :, :4, :4], sound[:, :, :4, :4])
        assert_close(tiles[:, :, 4:], sound[:, :, 4:] * 0.01 / 0.37)


def test_an_even_look_is_one_also_over_a_whole_clip():
    """VideoMAE's latents read all tokens of a clip at once, 8 moments of 4 places."""
    net = lavish.Lavish(lavish.make_backbone("videomae_nano"))
    model = lavish.UCF101(net, 3).eval()
    settings = train.Settings("ucf101", image_size=32, device="cpu")
    clip = [torch.randn(16, 3, 32, 32), torch.randn(8, 32, 32)]
    adapter = net.audio_adapters[0][0]
    even = torch.full((1, 2, 32), 1 / 32)
    adapter.compress = Mock(return_value=(even, torch.zeros(1, 2, 64)))
    rows = train.rows_of_latents(settings, model, clip, "sound reads sight", adapter)
    frames = train.rows_of(clip)["frame"]
    for number in (1, 2):
        assert_close(rows[f"sound reads sight: latent {number} (1.0 x even)"], frames)


def test_each_frame_that_is_drawn_has_the_attention_of_its_own():
    """UCF101 has two frames for a sound, of which every second is drawn."""
    net = lavish.Lavish(lavish.make_backbone("nano"))
    model = lavish.UCF101(net, 3).eval()
    settings = train.Settings("ucf101", image_size=32, device="cpu")
    clip = [torch.randn(16, 3, 32, 32), torch.randn(8, 32, 32)]
    attention = torch.full((16, 2, 64), 0.01)
    attention[range(16), :, range(16)] = 0.37  # of frame t the place t, in the first two rows
    adapter = net.audio_adapters[0][0]
    adapter.compress = Mock(return_value=(attention, torch.zeros(16, 2, 32)))
    rows = train.rows_of_latents(settings, model, clip, "sound reads sight", adapter)
    frames = train.rows_of(clip)["frame"]
    for tiles in rows.values():
        for t, (tile, frame) in enumerate(zip(tiles, frames)):
            row, column = divmod(2 * t, 8)
            place = (..., slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            assert_close(tile[place], frame[place])
            assert_close(tile[:, 8:], frame[:, 8:] * 0.01 / 0.37)


def test_look_compiles_nothing(toys, monkeypatch):
    """What is compiled calls no hooks, and would keep for minutes whoever looks."""
    main(f"ave --data={toys}/ave --epochs=1 --batch-size=3 --lr=0.1 --out=run")
    run = torch.load("run/adapters.pt")
    run["settings"]["compile"] = True
    torch.save(run, "run/adapters.pt")
    monkeypatch.setattr(torch, "compile", Mock(side_effect=AssertionError))
    main("look run")


def test_look_at_masks_swaps_the_sounds(toys, monkeypatch):
    """One frame beside other sounds; with sight's gates shut the masks are all the same."""
    main(f"avs --data={toys}/avs --epochs=1 --batch-size=3 --lr=0.1 --out=run")
    rows, _ = drawn_rows(monkeypatch, "look run")
    assert rows["heard"][-1] == "noise"
    assert len({*rows["heard"]}) == len(rows["frame"])
    assert (rows["frame"] == rows["frame"][:1]).all()
    shut = rows["with g_av at 0"]
    assert (shut == shut[:1]).all()


@parametrize("option", ["--latents=0", "--modality=v"])
def test_look_wants_latents(toys, capsys, option):
    """A late fusion has none to look at, nor has one stream alone: one line says so."""
    main(f"ave --data={toys}/ave --epochs=1 --out=run {option}")
    assert "no latents" in one_line_error(capsys, "look run")


def test_predict_reads_a_video_as_the_data_set_does(roots, monkeypatch):
    """Frames and sounds of the same moments, where sound and picture differ in length.

    One rule for both says which seconds are the moments.
    """
    write_wav("avqa/raw_audio/sa2.wav", noise(14.7))

    def extract_video(video, out):
        shutil.copytree("avqa", out, dirs_exist_ok=True)
        return video

    monkeypatch.setattr(data, "extract_video", extract_video)
    wanted = dataset("avqa")
    facts = {"stats": STATS, "vocabulary": wanted.vocabulary}
    asked = "How many  sounding piano in the video ？"  # spaces are typed as they come
    settings = train.Settings("avqa", image_size=SIZE, question=asked)
    clip = [*train.read_video(settings, facts, "sa2"), *train.read_question(settings, facts)]
    assert_same(clip, [*wanted[1][:3]])


@parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_resumes_bit_for_bit(toys, capsys, precision):
    """Without a worker or with one, with dropout and negatives, by its own settings.

    Order, dropout and negatives follow from the epoch alone, and so Adam goes on as if nothing had
    been.
    """
    line = f"avqa --data={toys}/avqa --epochs=4 --batch-size=3 --precision={precision}"
    main(f"{line} --workers=0 --out=whole")
    line += " --workers=1 --out=killed"
    run = subprocess.Popen([sys.executable, HERE / "train.py", *line.split()])
    while not Path("killed/state.pt").exists():
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -9
    assert "--resume" in one_line_error(capsys, line)
    os.rename("killed", "moved")
    main("avqa --resume --out=moved")
    assert not Path("toy").exists()  # a run on other data wants no toy
    assert_same(trained("moved"), trained("whole"))
    assert losses("moved") == losses("whole")
    assert result("moved")["test"] == result("whole")["test"]


START = "ave --epochs=3 --batch-size=3 --out=run"
RESUME = "ave --resume --out=run"


@pytest.fixture
def stopped(toys, monkeypatch, capsys):
    """A run that Ctrl-C ended at the end of its second epoch, before that was saved."""
    shutil.copytree(toys / "ave", "toy/ave")
    shutil.copy(toys / "nano.pt", "toy/nano.pt")

    with monkeypatch.context() as stopping:
        stopping.setattr(train, "best_epoch", Mock(side_effect=[0, 1, 1, KeyboardInterrupt]))
        assert "--resume" in one_line_error(capsys, START, code=130)


def test_a_stopped_run_goes_on_where_it_ran(stopped, monkeypatch):
    """Begun on a CPU, it stays there, though there is a GPU now: another device, other bits."""
    monkeypatch.setattr(torch.cuda, "is_available", Mock(return_value=True))
    monkeypatch.setattr(train.Settings, "device", "cuda")
    assert settings_of(monkeypatch, RESUME).device == "cpu"


def test_a_stopped_run_goes_on_with_other_rates_but_not_as_another_net(stopped, capsys):
    """A net that diverged is to go on with a lower --lr, as its one line advises.

    Going on with the same rates would end at the same place.
    """
    assert "a run of ave" in one_line_error(capsys, RESUME.replace("ave", "avs"))
    assert "latents" in one_line_error(capsys, f"{RESUME} --latents=3")
    error = one_line_error(capsys, f"{RESUME} --lr=9e8")
    assert re.search("not finite; try a lower --lr.*--resume", error)
    main(f"{RESUME} --lr=1e-4 --head-lr=1e-4")
    assert len(losses("run")) == 3


def test_on_a_full_disk_the_last_epoch_stays(stopped, capsys, monkeypatch):
    """One line says so, and nothing half-written is left.

    fsync fails here, as a disk does that fills up while a file is written; without fsync before
    the rename a power cut could leave an empty file under the right name.
    """
    before = Path("run/state.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", disk_is_full)
    assert "No space left" in one_line_error(capsys, RESUME)
    assert {*os.listdir("run")} == {"adapters.pt", "state.pt"}
    assert Path("run/state.pt").read_bytes() == before


@parametrize("line", ["eval run", "predict run a.mp4", RESUME])
def test_another_frozen_backbone_is_refused(stopped, capsys, line):
    """Adapters are worth nothing beside other weights.

    With nano.pt replaced by noise a score once fell from .50 to .17 without a word.
    """
    torch.save(lavish.make_backbone("nano").state_dict(), "toy/nano.pt")
    assert re.search("other (data or )?weights", one_line_error(capsys, line))


def test_eval_makes_no_weights(stopped, capsys):
    """Only training pretrains or downloads.

    Weights made anew would not be those that the adapters were trained beside.
    """
    os.remove("toy/nano.pt")
    assert "toy/nano.pt" in one_line_error(capsys, "eval run")
    assert not Path("toy/nano.pt").exists()


@parametrize("name, value", [("epochs", "many"), ("lr", None), ("unknown", 1)])
def test_the_settings_in_a_checkpoint_are_not_believed(stopped, capsys, name, value):
    """Wrong types and wrong names are refused.

    A checkpoint may be from a stranger, or from another version of this program.
    """
    run = torch.load("run/adapters.pt")
    run["settings"][name] = value
    torch.save(run, "run/adapters.pt")
    assert re.search(f"run/adapters.pt.*{name}", one_line_error(capsys, "eval run"))


KEEP = """
import torch, train
save_epoch = train.save_epoch
def keep(settings, facts, model, *others):
    items = train.gather(list(range(4) if train.rank() == 0 else range(4, 7)))
    torch.save([model.state_dict(), torch.rand(4), items], f"rank{train.rank()}.pt")
    save_epoch(settings, facts, model, *others)
train.save_epoch = keep
train.main()
"""


LEAVE = """
import os, sys
import torch.distributed as dist
import train

for number in range(60):
    meeting = f"file://{os.getcwd()}/group{number}"
    dist.init_process_group("gloo", init_method=meeting, rank=int(sys.argv[1]), world_size=2)
    assert train.gather([number]) == [number, number]
    train.leave_processes()
"""


def test_two_processes_part_without_waiting_for_ever(monkeypatch):
    """With torch 2.6 the first of them, or the second, often never came out of its group."""
    Path("leave.py").write_text(LEAVE)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    pair = [subprocess.Popen([sys.executable, "leave.py", number]) for number in "01"]
    try:
        assert [process.wait(timeout=120) for process in pair] == [0, 0]
    finally:
        for process in pair:
            process.kill()


@parametrize("task", ["ave", "avs"])
def test_two_processes_train_one_model_and_score_as_one(toys, monkeypatch, capsys, task):
    """By torchrun: the same weights, other noise in each, items gathered in their order.

    There are three test clips, so that one process has one more than the other: of AVS, which
    scores frames, five more. Other commands run in the first process alone.
    """
    Path("keep.py").write_text(KEEP)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    line = f"-m torch.distributed.run --standalone --nproc_per_node=2 keep.py {task} --device=cpu"
    line += f" --data={toys}/{task} --epochs=1 --batch-size=1 --out=run"
    subprocess.run([sys.executable, *line.split()], check=True)
    weights, noise, items = torch.load("rank0.pt")
    other_weights, other_noise, _ = torch.load("rank1.pt")
    assert_same(weights, other_weights)
    assert not torch.equal(noise, other_noise)
    assert items == [*range(7)]
    main("eval run")
    scores = result("run")["scores"]
    said = capsys.readouterr().out.splitlines()
    assert said[-len(scores) :] == [f"{name:45} {score:.4f}" for name, score in scores.items()]
    monkeypatch.setenv("RANK", "1")
    main("eval run")
    assert capsys.readouterr().out == ""  # the first process has done it


@parametrize(
    "line, code, said",
    [
        ("check flute .", 2, "unknown task 'flute'"),
        ("teach ave new", 2, "invalid choice: 'teach'"),
        ("check '' .", 2, "the name of a folder is empty"),
        ("check ave ''", 2, "the name of a folder is empty"),
        ("check ave ave --size 15", 2, "--size wants a number from 16 to 999"),
        ("check ave ave --size 1000", 2, "--size wants a number from 16 to 999"),
        ("toy ave ave", 2, "ave is there already"),
        ("extract none out", 2, "none is no folder of videos"),
        ("extract ave/video_frames out", 1, "0 of 2 videos are in out\nNext, with the annotations"),
        ("check ave ave", 0, "data.py stats ave ave --size 192"),
        ("check ave ave --size 16", 0, "data.py stats ave ave --size 16"),
        ("check ave ave --size 32", 0, "Next: python train.py ave --data ave"),
        ("check avqa avqa", 1, "Mend these 1 before training"),
        ("stats ave ave --size 16", 0, "ave/fbank16.json)\nNext: python train.py ave --data ave"),
    ],
)
def test_data_py_as_a_person_types_it(roots, monkeypatch, capfd, line, code, said):
    """One line on stderr and exit code 2, or what comes next on stdout.

    A trace on stderr, or an error that exits with 0, would break a script around it.
    """
    monkeypatch.setattr(sys, "argv", ["data.py", *shlex.split(line)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(data.__file__, run_name="__main__")
    assert stop.value.code == code
    assert said in capfd.readouterr()[code == 2]
    if line.startswith("stats"):
        assert data.find_stats("ave", "ave", 16) == data.read_json("ave/fbank16.json")


def test_the_next_command_can_be_pasted(roots, monkeypatch, capsys):
    """Also where a folder has a space in its name. Of no videos there is none."""
    os.rename("ave", "my data")
    data.check("ave", "my data", SIZE)
    assert "Next: python train.py ave --data 'my data'\n" in capsys.readouterr().out
    os.mkdir("empty")
    refuses("empty is no folder of videos", data.extract, "empty", "out")


@parametrize("line", ["ave --latent=0", "eval run --split=tset"])
def test_a_misspelt_option_is_refused(capsys, line):
    """--latent is no short form: whoever types it may mean another option."""
    with pytest.raises(SystemExit) as stop:
        main(line)
    assert stop.value.code == 2
    assert re.search(
        "unrecognized arguments: --latent|invalid choice: 'tset'", capsys.readouterr().err
    )


def test_the_empty_folder_of_a_killed_run_is_taken(toys, monkeypatch):
    """It holds nothing that could be lost."""
    os.mkdir("run")
    assert settings_of(monkeypatch, f"ave --data={toys}/ave --out=run").out == "run"


def test_control_c_exits_as_programs_do(monkeypatch, capsys):
    """130, by which a shell ends a loop around it."""
    monkeypatch.setattr(sys, "argv", ["data.py", "toy", "avs", "a"])
    monkeypatch.setattr(data, "make_toy", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        data.main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "data.py: stopped; run the same command again\n"


def test_a_run_is_not_scored_on_data_of_other_classes(toys, capsys):
    """One line says so.

    In another order the numbers of the classes mean other events, and the score is one of chance.
    """
    shutil.copytree(toys / "ave", "ave")
    shutil.copy(toys / "nano.pt", "nano.pt")
    main("ave --data=ave --epochs=1 --out=run")
    annotations = Path("ave/Annotations.txt")
    header, *rows = annotations.read_text().splitlines()
    annotations.write_text("\n".join([header, *reversed(rows)]))
    assert "other classes" in one_line_error(capsys, "eval run")
    assert "other classes" in one_line_error(capsys, "look run")


def test_what_a_run_prints_and_keeps_of_itself(toys, monkeypatch, capsys):
    """A line for each epoch; what report reads is the first score on test, and settings, code and
    seconds beside it.
    """
    script = iter([0.1, 0.5, 0.2, 0.9])

    def score(settings, facts, model, loader):
        return {"accuracy": next(script), "other": 0.0}

    monkeypatch.setattr(train, "evaluate_ave", score)
    main(f"ave --data={toys}/ave --epochs=3 --batch-size=9 --out=run")
    run = result("run")
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("epoch")]
    assert len(lines) == len(run["log"]) == 3
    for number, (line, done) in enumerate(zip(lines, run["log"]), 1):
        loss, val = f"{done['loss']:.4f}", f"{done['val']:.4f}"
        assert line.split()[:6] == ["epoch", f"{number}", "loss", loss, "val", val]
        assert 0 < done["seconds"] < 100
    assert ["best so far" in line for line in lines] == [True, True, False]
    assert [done["val"] for done in run["log"]] == [0.1, 0.5, 0.2]
    assert run["seconds"] == pytest.approx(sum(done["seconds"] for done in run["log"]))
    assert run["test"] == 0.9
    assert run["code"] == train.CODE
    assert (run["settings"]["epochs"], run["settings"]["out"]) == (3, "run")
    _, _, model = train.open_run("run", {})
    sizes = [(p.requires_grad, p.numel()) for p in model.parameters()]
    learned = sum(size for is_learned, size in sizes if is_learned)
    assert f" {learned:,} of {sum(size for _, size in sizes):,}\n" in printed


def test_the_picture_of_a_run_has_what_it_found_and_the_truth(toys, monkeypatch):
    """Of the clip that first_with_error chooses: here the second one."""
    choose = Mock(side_effect=lambda settings, model, dataset: dataset[1])
    monkeypatch.setattr(train, "first_with_error", choose)
    line = f"ave --data={toys}/ave --epochs=1 --batch-size=3 --lr=0.1 --out=run"
    drawn, _ = drawn_rows(monkeypatch, line)
    looked_at, _ = drawn_rows(monkeypatch, "look run --split=train")  # it is test still
    _, facts, model = train.open_run("run", {})
    frames, spectrograms, labels = data.AVEDataset(f"{toys}/ave", "test", SIZE)[1]
    names = [*facts["classes"], "background"]
    found = model(frames[None], spectrograms[None])[0].argmax(-1)
    assert not torch.equal(found, labels)
    for rows in (drawn, looked_at):
        assert rows["found"] == [names[k] for k in found]
        assert rows["true"] == [names[k] for k in labels]
        assert_same(rows["frame"], train.rows_of([frames, spectrograms])["frame"])


def test_the_first_clip_with_an_error_is_chosen_or_else_the_first_one(monkeypatch):
    """The net of this test answers with what it is shown."""
    monkeypatch.setattr(train, "predict_clip", lambda settings, model, clip: clip[0])
    right = torch.tensor([1, 2])
    other = torch.tensor([1, 3])
    clips = [[right, 0, right], [right, 1, other], [right, 2, other]]
    assert train.first_with_error(None, None, clips)[1] == 1
    clips = [[right, 0, right], [other, 1, other]]
    assert train.first_with_error(None, None, clips)[1] == 0


@parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_is_that_of_matrix_products(precision, dtype):
    """A run in the other one, or in float16, would score about the same."""
    settings = train.Settings("ave", precision=precision, device="cpu")
    with train.autocast(settings):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == dtype


def test_a_trained_run_is_used_where_it_is_now(toys, capsys):
    """In another folder, and on this machine, though it was trained on a device that it lacks."""
    main(f"ave --data={toys}/ave --epochs=1 --batch-size=3 --out=run")
    run = torch.load("run/adapters.pt")
    run["settings"]["device"] = "meta"
    torch.save(run, "run/adapters.pt")
    os.rename("run", "moved")
    main("look moved")
    assert {*os.listdir("moved")} == {"adapters.pt", "result.json", "test.png", "look.png"}
    assert not train.open_run("moved", {})[2].training
    main("look moved --out=new")
    assert {*os.listdir()} == {"moved", "new"}
    assert os.listdir("new") == ["look.png"]
    assert "--device meta cannot be used" in one_line_error(capsys, "eval moved --device=meta")


def test_eval_scores_the_split_that_is_asked_for(toys, monkeypatch):
    """With the task's own scores; test, unless another one is given."""
    main(f"ave --data={toys}/ave --epochs=1 --batch-size=3 --out=run")
    score = Mock(return_value={})
    monkeypatch.setitem(train.SCORERS, "ave", score)
    for split in ("train", "val", "test"):
        main(f"eval run --split={split}" if split != "test" else "eval run")
        _, _, _, loader = score.call_args.args
        assert_same(loader.dataset[0], data.AVEDataset(f"{toys}/ave", split, SIZE)[0])


def test_a_checkpoint_of_another_program_is_named(capsys):
    """It may hold anything: another dictionary, without settings."""
    os.mkdir("run")
    torch.save({"model": torch.zeros(1)}, "run/adapters.pt")
    assert "run/adapters.pt is of no run" in one_line_error(capsys, "eval run")


def test_predict_cuts_a_film_into_clips_and_numbers_its_seconds(toys, capsys, monkeypatch):
    """Ten seconds and the three that are left. The names of the pictures begin with no dot, which
    would hide them.
    """
    main(f"ave --data={toys}/ave --epochs=1 --batch-size=3 --out=run")
    frames, spectrograms = images(13, size=SIZE)
    film = [frames.float(), spectrograms.float()]
    monkeypatch.setattr(train, "read_video", Mock(return_value=film))
    draw = Mock()
    monkeypatch.setattr(train, "draw", draw)
    os.mkdir("here")
    monkeypatch.chdir("here")
    capsys.readouterr()
    main("predict ../run ../a.mp4 --out=new")
    seconds = re.findall(r"^\.\./a.mp4, from (\d+) s: \w", capsys.readouterr().out, re.MULTILINE)
    assert seconds == [str(t) for t in range(13)]
    paths = [call.args[1] for call in draw.call_args_list]
    assert paths == ["new/run-..-a.mp4-0000.png", "new/run-..-a.mp4-0010.png"]
    shown = [call.args[0]["frame"] for call in draw.call_args_list]
    main("predict ../run ../a.mp4")
    assert draw.call_args.args[1] == "./run-..-a.mp4-0010.png"
    assert_same(torch.cat(shown), train.rows_of(film)["frame"])
    assert "predict wants the folder of a run, then videos" in one_line_error(
        capsys, "predict ../run"
    )


def test_predict_draws_masks_of_five_seconds_each(toys, capsys, monkeypatch):
    """It does not print them."""
    main(f"avs --data={toys}/avs --epochs=1 --out=run")
    frames, spectrograms = images(12, size=SIZE)
    film = (frames.float(), spectrograms.float())
    monkeypatch.setattr(train, "read_video", Mock(return_value=film))
    draw = Mock()
    monkeypatch.setattr(train, "draw", draw)
    capsys.readouterr()
    main("predict run a.mp4")
    assert capsys.readouterr().out == ""
    assert [call.args[1][-8:] for call in draw.call_args_list] == [
        "0000.png",
        "0005.png",
        "0010.png",
    ]
    assert draw.call_args.args[0]["found"].shape == (2, SIZE, SIZE)


def test_predict_asks_avqa_its_question(toys, capsys, monkeypatch):
    """All moments at once: the answer is one of the whole video."""
    main(f"avqa --data={toys}/avqa --epochs=1 --batch-size=3 --moments=3 --out=run")
    settings, facts, model = train.open_run("run", {})
    frames, spectrograms, question, _ = data.DATASETS["avqa"](
        f"{toys}/avqa", "test", SIZE, facts["stats"], moments=3
    )[0]
    read_video = Mock(return_value=(frames, spectrograms))
    monkeypatch.setattr(train, "read_video", read_video)
    unknown = one_line_error(capsys, "predict run a.mp4 b.mp4 --question='Is the purple one loud?'")
    assert "no training question has the word 'purple'" in unknown
    read_video.assert_not_called()  # a wrong question is no fault of a video
    words = facts["vocabulary"]["words"]
    asked = " ".join(words[index] for index in question if index > 0)
    rows, _ = drawn_rows(monkeypatch, f"predict run a.mp4 --question='{asked}?'")
    logits, _ = model(frames[None], spectrograms[None], question[None])
    answer = facts["vocabulary"]["answers"][logits.argmax()]
    printed = capsys.readouterr().out
    assert f"a.mp4: {asked}? {answer}\n" in printed
    assert f"./run-a.mp4-0000-{asked.replace(' ', '-')}.png" in printed
    assert rows["found"] == [answer]
    assert len(rows["frame"]) == 3


def test_a_mask_is_where_the_sigmoid_is_above_a_half():
    """So at logits above 0."""
    model = Recited(torch.tensor([[[[-0.2, 0.2]]]]))
    masks = train.predict_clip(train.Settings("avs", device="cpu"), model, [IMAGES])
    assert masks.tolist() == [[[False, True]]]


@parametrize(
    "settings, fault",
    [
        (train.Settings("ucf101"), "videos are for ave"),
        (train.Settings("ave", extra_audio="vggish.npy"), "videos are for ave .without"),
        (train.Settings("ave", question="How many?"), "--question is for avqa alone"),
        (train.Settings("avqa"), "avqa wants --question"),
    ],
)
def test_videos_that_a_run_cannot_use_are_refused(settings, fault):
    """Once, not for each of the videos."""
    refuses(fault, train.read_question, settings, {})


def open_look(toys, monkeypatch):
    """A run of AVE, opened as `look run` will open it -> settings, facts, model."""
    main(f"ave --data={toys}/ave --epochs=1 --batch-size=3 --lr=0.1 --out=run")
    opened = train.open_run("run", {})
    monkeypatch.setattr(train, "open_run", Mock(return_value=opened))
    return opened


def table_of_look(capsys):
    """What look has printed: the score of the untouched net, and the columns of each adapter."""
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 80
    _, *lines, _ = printed
    rows = {line[:38].strip(): line[38:].split() for line in lines}
    (untouched,) = rows.pop("none")
    return untouched, rows


def test_look_draws_the_two_adapters_without_which_the_score_is_lowest(toys, capsys, monkeypatch):
    """Scores by a script: each is that of a net with one gate shut, and is printed beside it."""
    _, _, model = open_look(toys, monkeypatch)
    named = train.adapters_with_latents(model.net)
    assert named["sight reads sound, block 1, attention"] is model.net.visual_adapters[0][0]
    assert named["sound reads sight, block 3, MLP"] is model.net.audio_adapters[2][1]
    gates = [adapter.gate_av.item() for adapter in named.values()]
    for adapter in named.values():
        adapter.gate.data.fill_(0.25)
    script = [0.9, *np.linspace(0.8, 0.7, len(named))]
    script[3] = 0.2
    script[6] = 0.1
    shut = []

    def score(settings, facts, model, loader):
        shut.append([name for name, adapter in named.items() if adapter.gate_av.item() == 0])
        return {"accuracy": script[len(shut) - 1], "other": 0.0}

    monkeypatch.setitem(train.SCORERS, "ave", score)
    capsys.readouterr()
    rows, _ = drawn_rows(monkeypatch, "look run")
    assert shut == [[], *([name] for name in named)]
    assert [adapter.gate_av.item() for adapter in named.values()] == gates
    untouched, table = table_of_look(capsys)
    assert untouched == "0.9000"
    assert [*table] == [*named]
    for columns, gate, wanted in zip(table.values(), gates, script[1:]):
        assert columns == ["0.250", f"{gate:.3f}", f"{wanted:.4f}"]
    names = [*named]
    read = [name.split(":")[0] for name in rows if "latent" in name]
    assert read == [names[5], names[5], names[2], names[2]]  # two latents of each


def test_look_at_a_video_scores_the_labels_that_stay(toys, capsys, monkeypatch):
    """Nobody has said what is true of it. By hand: shut a gate, count the same labels."""
    _, _, model = open_look(toys, monkeypatch)
    named = train.adapters_with_latents(model.net)
    frames, spectrograms = images(10, size=SIZE)
    video = [frames.float(), spectrograms.float()]
    read_video = Mock(return_value=video)
    monkeypatch.setattr(train, "read_video", read_video)
    torch.nn.init.normal_(model.head[1].weight)  # answers that differ from second to second
    model.head[1].bias.data -= model(*[x[None] for x in video]).mean((0, 1)).detach()
    for adapter in named.values():
        adapter.gate_av.data.fill_(5)
    main("look run")
    capsys.readouterr()
    rows, _ = drawn_rows(monkeypatch, "look run b/a.mp4")
    assert {"look.png", "look-a.mp4.png"} <= {*os.listdir("run")}  # neither hides the other
    assert read_video.call_args.args[2] == "b/a.mp4"
    untouched, table = table_of_look(capsys)
    assert untouched == "1.0000"
    labels = model(*[x[None] for x in video]).argmax(-1)
    shares = []
    for adapter in named.values():
        adapter.gate_av.data.zero_()
        same = model(*[x[None] for x in video]).argmax(-1) == labels
        adapter.gate_av.data.fill_(5)
        shares.append(f"{same.float().mean():.4f}")
    assert [columns[2] for columns in table.values()] == shares
    assert len({*shares}) > 1
    assert "true" not in rows
    assert len(rows["found"]) == 10
    assert "at most one video" in one_line_error(capsys, "look run a.mp4 b.mp4")


def test_an_attention_map_has_no_place_for_a_class_token():
    """A ViT's first token is no place in the picture, however much it is read."""
    net = lavish.Lavish(lavish.make_backbone("vit_nano"))
    model = lavish.AVE(net, 3).eval()
    settings = train.Settings("ave", image_size=32, device="cpu")
    clip = [torch.randn(2, 3, 32, 32), torch.randn(2, 32, 32)]
    attention = torch.full((2, 2, 17), 0.01)  # 4 x 4 patches behind it
    attention[:, :, 0] = 0.5
    attention[:, :, 4] = 0.35  # the last of the first row
    adapter = net.audio_adapters[0][0]
    adapter.compress = Mock(return_value=(attention, torch.zeros(2, 2, 80)))
    rows = train.rows_of_latents(settings, model, clip, "sound reads sight", adapter)
    frames = train.rows_of(clip)["frame"]
    for tiles in rows.values():
        assert_close(tiles[:, :, :8, 24:], frames[:, :, :8, 24:])
        assert_close(tiles[:, :, 8:], frames[:, :, 8:] * 0.01 / 0.35)


@parametrize("root", ["toy", "avs"])
def test_sounds_are_swapped_for_the_first_of_each_category(roots, toys, monkeypatch, root):
    """Beside the first frame: the first second of the first clip of a category, and faint noise.

    Each is a clip of its own: TPAVI would mix them. Of the small data set, because its one category
    comes after noise in the alphabet.
    """
    root = f"{toys}/avs" if root == "toy" else root
    settings = train.Settings("avs", data=root, image_size=SIZE)
    items = data.DATASETS["avs"](settings.data, "test", SIZE, STATS)
    categories = [category for _, category in items.videos]
    model = Mock(net=lavish.Lavish(lavish.make_backbone("nano")))
    gates = []

    def logits_of(settings, model, clips):
        adapters = train.adapters_with_latents(model.net).values()
        gates.append([adapter.gate_av.item() for adapter in adapters])
        heard.append(clips)
        return torch.full((len(clips[0]), 1, 2, 2), 2 * gates[-1][0] - 1)

    heard = []
    for adapter in train.adapters_with_latents(model.net).values():
        adapter.gate_av.data.fill_(1)
    monkeypatch.setattr(train, "logits_of", logits_of)
    clip = items[-1 % len(items)][:2]
    rows = train.swap_sounds(settings, {"stats": STATS}, model, clip)
    assert rows["mask found"].all()
    assert not rows["with g_av at 0"].any()
    assert rows["mask found"].shape == rows["with g_av at 0"].shape == (len(rows["heard"]), 2, 2)
    assert gates == [[1] * len(gates[0]), [0] * len(gates[0])]
    assert heard[0] is heard[1]
    assert [x.shape[1] for x in heard[0]] == [1, 1]
    frames, sounds = [x[:, 0] for x in heard[0]]
    assert rows["heard"] == [*dict.fromkeys(categories), "noise"]
    assert len(rows["heard"]) == len(sounds) > 1
    for name, sound in zip(rows["heard"][:-1], sounds):
        _, spectrograms, _ = items[categories.index(name)]
        assert_same(sound, spectrograms[0])
    assert_same(frames, clip[0][[0] * len(sounds)])
    faint = data.spectrograms_of(0.01 * torch.randn(1, 16000), SIZE, STATS)
    assert sounds[-1].mean().item() == pytest.approx(faint.mean().item(), abs=0.1)


def test_frames_are_drawn_as_they_are_and_sounds_from_black_to_white(roots):
    """The greys of the pictures that were read."""
    frames, spectrograms, _ = dataset("ave")[0]
    frame, sound = train.rows_of([frames, spectrograms]).values()
    assert (255 * frame).mean((1, 2, 3)).round().tolist() == grey_of(frames)
    assert grey_of(frames)[0] == pytest.approx(10, abs=2)
    assert (sound.min(), sound.max()) == (0, 1)
    _, silence = train.rows_of([frames, torch.ones(10, SIZE, SIZE)]).values()
    assert (silence == 0).all()
    frames, spectrograms, _ = dataset("ucf101")[0]
    frame, _ = train.rows_of([frames, spectrograms]).values()
    assert (255 * frame).mean((1, 2, 3)).round().tolist() == grey_of(frames[::2])


def test_a_question_stands_above_its_answers():
    """Without the words that fill it up. AVE's last label is background."""
    facts = {"vocabulary": {"words": ["", "is", "it", "loud"], "answers": ["no", "yes"]}}
    clip = [None, None, torch.tensor([1, 2, 3, 0, 0])]
    answers = {"found": torch.tensor(1), "true": torch.tensor(0)}
    rows = train.rows_of_answers(train.Settings("avqa"), facts, clip, answers)
    assert [*rows.items()] == [("question", ["is it loud"]), ("found", ["yes"]), ("true", ["no"])]
    answers = {"found": torch.tensor([1, 2, 0])}
    rows = train.rows_of_answers(train.Settings("ave"), {"classes": ["a", "b"]}, [], answers)
    assert rows == {"found": ["b", "background", "a"]}


def test_tiles_stand_in_their_rows_and_columns():
    """Colours, greys and masks; what is brighter than white is white."""
    red, blue = torch.tensor([[1.0, 0, 0], [0, 0, 1.5]]).view(2, 3, 1, 1)
    grey = torch.full((3, 1, 8, 8), 0.4)
    mask = torch.tensor([[True, False]]).expand(1, 8, 2)
    colours = torch.stack([red, blue]).expand(-1, -1, 8, 8)
    train.draw({"a": colours, "b": grey, "c": mask, "d": ["text"]}, "new/page.png")
    page = Image.open("new/page.png")
    step = train.TILE + 4
    assert page.size == (190 + 6 * step, 3 * step + 28)
    white = (255, 255, 255)
    black = (0, 0, 0)
    wanted = [
        [(255, 0, 0), (0, 0, 255), white],
        [(102, 102, 102)] * 3,
        [white, white, white],
    ]
    for row, colours in enumerate(wanted):
        for column, colour in enumerate(colours):
            x = 190 + column * step
            y = row * step
            assert page.getpixel((x + 3, y + 3)) == colour
            assert page.getpixel((x + train.TILE + 1, y + 3)) == white  # the edge
    assert page.getpixel((190 + train.TILE - 3, 2 * step + 3)) == black  # the mask's other half
    train.draw({"a": ["text"], "b": torch.zeros(8, 1, 2, 2)}, "page.png")
    assert Image.open("page.png").width == 190 + 8 * step  # as wide as the longest row
    train.draw({"a": ["Fixed-wing aircraft, airplane", "Bark"]}, "page.png")
    page = Image.open("page.png")
    assert page.height == 3 * 28  # three lines, within the column
    assert page.crop((190 + step - 4, 0, 190 + step + 4, 84)).getcolors() == [(8 * 84, white)]
    texts = []
    for text in ("text", "longer text"):
        train.draw({"d": [text]}, "page.png")
        texts.append(Image.open("page.png").crop((190, 0, 600, 28)).getcolors())
    assert texts[0] != texts[1]


# ---------------------------------------------------------------- report and bench


@parametrize(
    "more, group",
    [
        (
            {"seed": 1, "workers": 2, "device": "cuda", "resume": True},
            ["0.6000", "0.1414", "2", "1.0000", "20", "a"],
        ),
        ({"lr": 0.5}, ["0.5000", "-", "1", "1.0000", "10", "a"]),
        ({"code": 2}, ["0.5000", "-", "1", "1.0000", "10", "a"]),
    ],
)
def test_report_groups_runs_that_differ_in_seed_paths_and_device_alone(capsys, more, group):
    """Mean, spread, number and GFLOP of the first group; another setting makes another group.

    Runs with other settings are no repetitions, and their spread is none of seeds.
    """
    runs = [("a", "x/AVE", 0.5, 10, {}), ("b", "y/AVE/", 0.7, 30, more)]
    for out, place, test, seconds, changed in runs:
        run = {"test": test, "seconds": seconds, "gflop": 1, "code": changed.pop("code", 1)}
        settings = train.Settings("ave", data=place, out=out, **changed)
        run["settings"] = dataclasses.asdict(settings)
        os.mkdir(out)
        Path(out, "result.json").write_text(json.dumps(run))
    main("report a b")
    assert capsys.readouterr().out.splitlines()[1].split()[1:] == group


def test_report_averages_no_runs_of_different_settings(capsys):
    """Each of all other settings makes a group of its own."""
    same = ("task", "data", "out", "seed", "workers", "device", "resume")
    others = [field for field in dataclasses.fields(train.Settings) if field.name not in same]
    changed = [{}]
    for field in others:
        value = getattr(train.Settings, field.name)
        changed.append({field.name: not value if field.type is bool else value * 2 + field.type(3)})
    for number, change in enumerate(changed):
        settings = dataclasses.asdict(train.Settings("ave", **change))
        run = {"test": 1, "seconds": 1, "gflop": 1, "code": 1, "settings": settings}
        os.mkdir(f"{number}")
        Path(f"{number}/result.json").write_text(json.dumps(run))
    main("report " + " ".join(os.listdir()))
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(changed)


def test_at_most_four_categories_and_noise_are_swapped(monkeypatch):
    """A data set has many; a picture has room for few."""
    items = MagicMock(videos=[(f"clip {k}", "abcade"[k]) for k in range(6)])
    items.__getitem__.return_value = (None, torch.zeros(5, SIZE, SIZE), None)
    monkeypatch.setattr(train, "open_split", Mock(return_value=items))
    monkeypatch.setattr(train, "logits_of", Mock(return_value=torch.zeros(5, 1, 2, 2)))
    settings = train.Settings("avs", image_size=SIZE)
    model = Mock(net=lavish.Lavish(lavish.make_backbone("nano")))
    clip = [torch.zeros(5, 3, SIZE, SIZE), torch.zeros(5, SIZE, SIZE)]
    rows = train.swap_sounds(settings, {"stats": STATS}, model, clip)
    assert rows["heard"] == ["a", "b", "c", "d", "noise"]


def test_bench_is_of_the_real_sizes():
    """Those of AVE, AVSBench and MUSIC-AVQA."""
    sizes = train.REAL_SIZES
    assert (len(sizes["classes"]), sizes["mask_size"]) == (28, 224)
    assert [len(sizes["vocabulary"][what]) for what in ("words", "answers")] == [93, 42]


@parametrize("name", ["test", "seconds", "gflop"])
def test_report_names_a_result_that_is_none(capsys, name):
    """Somebody's result.json, with other things under the same names."""
    settings = dataclasses.asdict(train.Settings("ave"))
    run = {"test": 1, "seconds": 1, "gflop": 1, "settings": settings, name: None}
    os.mkdir("a")
    Path("a/result.json").write_text(json.dumps(run))
    assert "a/result.json is no result of a run" in one_line_error(capsys, "report a")


def test_weights_that_are_refused_leave_no_folder(toys, capsys):
    """It would block the same command with the right weights."""
    data.save_tensors({"a": torch.zeros(1)}, "wrong.pt")
    line = f"ave --data={toys}/ave --epochs=1 --out=run --weights="
    assert "do not fit" in one_line_error(capsys, line + "wrong.pt")
    assert not Path("run").exists()


def test_the_checksum_of_the_code_changes_with_any_of_its_files(tmp_path, monkeypatch):
    """An exercise is a change of one line: its runs are no repetitions of those before it."""
    before = train.checksum_of_code()
    assert before == train.checksum_of_code()
    for module in (lavish, data, train):
        changed = tmp_path / "changed.py"
        changed.write_bytes(Path(module.__file__).read_bytes() + b"#")
        with monkeypatch.context() as change:
            change.setattr(module, "__file__", str(changed))
            assert train.checksum_of_code() != before
    assert before == train.CODE  # a file may be edited while a run goes on


@parametrize(
    "line",
    [
        "ave --backbone=nano",
        "avs --backbone=nano --channels=8",
        "avqa --backbone=nano",
        "avqa --backbone=nano --modality=v",
        "ucf101 --backbone=videomae_nano",
    ],
)
def test_bench_of_every_task(capsys, line):
    """Speed of training and evaluation, memory, and the operations of one clip.

    On random clips of the real lengths, so without any data.
    """
    main(f"bench {line} --repeat=1")
    printed = capsys.readouterr().out
    assert printed.count("clips/s") == 2
    assert "GFLOP a clip" in printed


@parametrize(
    "line, first_of_training, shape",
    [
        ("avs --backbone=nano --channels=8", True, (1, 5)),
        ("avqa --backbone=nano --moments=3", "frames", (1, 3)),
        ("avqa --backbone=nano --moments=3 --modality=v", None, (1, 3)),
    ],
)
def test_bench_runs_the_net_as_the_loops_do(monkeypatch, line, first_of_training, shape):
    """AVS trains on first frames alone, AVQA with negatives; evaluation needs no gradients. GFLOP
    are those of one clip in evaluation.
    """
    calls = []
    learned = []
    head = getattr(lavish, line.split()[0].upper())
    forward = head.forward

    def spy(model, *inputs):
        last = inputs[-1] if inputs[-1] is True else "frames" if inputs[-1].dim() == 5 else None
        calls.append((model.training, torch.is_grad_enabled(), last, inputs[0].shape[:2]))
        return forward(model, *inputs)

    def step(optimizer):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        learned.append(any(grad is not None and grad.any() for grad in grads))

    monkeypatch.setattr(head, "forward", spy)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    main(f"bench {line} --repeat=1 --batch-size=2")
    _, T = shape
    training = (True, True, first_of_training, (2, T))
    evaluation = (False, False, None, (2, T))
    assert learned == [True, True]
    assert calls == [training] * 2 + [evaluation] * 2 + [(False, False, None, shape)]


def test_bench_is_of_one_clip_on_the_papers_net(monkeypatch):
    """With random weights: to measure needs no download."""
    bench = Mock()
    monkeypatch.setattr(train, "bench", bench)
    main("bench avs")
    (settings,) = bench.call_args.args
    assert settings == train.replace(train.PAPER["avs"], batch_size=1, weights="none")


def test_bench_leaves_out_the_first_step(monkeypatch, capsys):
    """It warms up. By hand: two clips in one second, two in two seconds, the median of both."""
    monkeypatch.setattr(train, "clock", Mock(side_effect=[0, 9, 10, 12] * 2))
    main("bench ave --backbone=nano --repeat=2 --batch-size=2")
    printed = capsys.readouterr().out
    assert printed.count(" 1.5 clips/s, median of [2. 1.]\n") == 2
    assert 0.05 < float(re.search(r"memory +(\S+) GB", printed)[1]) < 500


class Attended(torch.nn.Module):
    """A net of one layer, whose operations are easily counted."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.MultiheadAttention(SIZE, 2, batch_first=True)

    def forward(self, frames, spectrograms):
        sounds = spectrograms.flatten(0, 1)  # (BT,S,S)
        seen, _ = self.layer(sounds, sounds, sounds, need_weights=False)
        return seen


def test_gflop_are_those_of_one_clip():
    """By hand: queries, keys, values and output are S x S matrices on S tokens; the attention has
    two products of this size. A multiplication and an addition are two operations.
    """
    settings = train.Settings("ave", image_size=SIZE, device="cpu", batch_size=3)
    torch.backends.mha.set_fastpath_enabled(True)
    wanted = 10 * (4 + 2) * 2 * SIZE**3 / 1e9
    assert train.count_gflop(settings, Attended()) == pytest.approx(wanted)
