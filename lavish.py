# SPDX-License-Identifier: MIT
"""LAVISH: Latent Audio-Visual Hybrid adapters, in one file to read beside the paper.

"Vision Transformers are Parameter-Efficient Audio-Visual Learners", Lin, Sung, Lei, Bansal,
Bertasius, CVPR 2023, https://arxiv.org/abs/2212.07983

A frozen image transformer runs on video frames and, with the very same weights, on audio
spectrograms shown to it as images. A small trainable adapter works beside every attention and every
MLP, one for each stream. Through it the stream reads a summary of the other one:

    Y_v = X_v + MSA(X_v) + LAV(X_v <- X_a)      Z_v = Y_v + MLP(Y_v) + LAV(Y_v <- Y_a)
    Y_a = X_a + MSA(X_a) + LAV(X_a <- X_v)      Z_a = Y_a + MLP(Y_a) + LAV(Y_a <- Y_v)

Glossary
    code           paper     shape           meaning
    B, T                                     clips in a batch; seconds (frames) of a clip
    BT                                       images in a batch, B*T
    N, d                                     tokens of one image; their width at this stage (M:
                                             tokens that an adapter reads of the other stream)
    frames         I         (B,T,3,S,S)     one video frame per second; S pixels a side
    spectrograms   A         (B,T,S,S)       one log-mel image per second: rows time, columns mel
    x, other       X_v, X_a  (BT,N,d)        tokens of the stream to update; of the other stream
    latents        L         (m,d)           m learned latent tokens of one adapter
    summary        S (eq. 7) (BT,m,d)        what the latents read from the other stream
    gate_av, gate  g_av, g   (1,)            learned scalars, 0 at the start
    reduction      r                         bottleneck: d -> d/r -> d
    groups                                   channel groups of the bottleneck's 1x1 convolutions
    visual, audio                            per stage, the tokens of the two streams

Read from top to bottom: the adapter, the two streams, how sound becomes an image, the tasks' heads,
then the frozen backbones and how their weights are loaded. `require(condition, message)` stops with
an InputError, one line for the user; both are at the end. `python lavish.py` follows one clip
through a small net and prints the parameter counts.

Where a comment names a file and line, it is of the authors' released code,
github.com/GenjiB/LAVISH at 97722b0.
"""

import math
import re
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchaudio
import torchvision
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import Bottleneck

# ---------------------------------------------------------------- the adapter


class LavishAdapter(nn.Module):
    """One stream's update from the other stream, through m latent tokens (Sec. 3.2).

    forward(x (BT,N,dim), other (BT,M,dim)) -> (BT,N,dim), to be added to x. The cost is
    O(m (N + M) dim), where direct cross-attention takes O(N M dim).
    latents=0 builds the adapter that reads nothing of the other stream: it ignores `other`.
    Raises ValueError if reduction x groups does not divide dim, or if `other` is missing."""

    def __init__(self, dim, latents=2, reduction=8, groups=2):
        super().__init__()
        if dim % (reduction * groups):
            raise ValueError(f"dim {dim} is no multiple of reduction {reduction} x groups {groups}")
        if latents > 0:
            # Random: equal latents get equal gradients and stay equal, so that m of them act as
            # one. Released AVE: random (net_trans.py:55); AVQA: zeros (net_avst.py:34).
            self.latents = nn.Parameter(torch.rand(latents, dim))
            self.gate_av = nn.Parameter(torch.zeros(1))
        hidden = dim // reduction
        self.norm_in = nn.LayerNorm(dim)
        # A 1x1 convolution in groups is one linear layer for each group of channels.
        wide = dim // groups
        narrow = hidden // groups
        self.down = nn.ModuleList(nn.Linear(wide, narrow, bias=False) for _ in range(groups))
        self.bn_down = nn.BatchNorm1d(hidden)
        self.up = nn.ModuleList(nn.Linear(narrow, wide, bias=False) for _ in range(groups))
        self.bn_up = nn.BatchNorm1d(dim)
        self.norm_out = nn.LayerNorm(dim)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, other=None):
        if hasattr(self, "latents"):
            if other is None:
                raise ValueError("an adapter with latents reads the other stream: give `other`")
            _, summary = self.compress(other)  # (BT,m,dim)
            # Fuse: x' = x + softmax(x summary^T) (g_av summary)
            attention = (x @ summary.transpose(1, 2)).softmax(-1)  # (BT,N,m)
            x = x + attention @ (self.gate_av * summary)  # (BT,N,dim)

        # Bottleneck: LN(BN(up(relu(BN(down(LN(x')))))))
        z = self.norm_in(x).flatten(0, 1)  # (BT*N,dim)
        z = self.bn_down(self.in_groups(self.down, z)).relu()  # (BT*N,dim/r)
        z = self.bn_up(self.in_groups(self.up, z))  # (BT*N,dim)
        z = self.norm_out(z.view(x.shape))  # (BT,N,dim)
        # g = 0 at the start, so that the network is exactly the frozen one. The gate comes after
        # the norm, because a norm undoes scaling (released AVS: before, PVT_AVSModel.py:147-152).
        return self.gate * z

    def compress(self, other):
        """Other stream y (BT,M,dim) -> where each latent looks (BT,m,M), what it reads (BT,m,dim).

        Eq. 7: summary = L + softmax(L y^T) y. One head and no projections: the latents are learned
        queries already. No 1/sqrt(d) either, here or in `forward`, as the paper has none."""
        attention = (self.latents @ other.transpose(1, 2)).softmax(-1)  # (BT,m,M)
        summary = self.latents + attention @ other  # (BT,m,dim)
        return attention, summary

    @staticmethod
    def in_groups(linears, z):
        parts = z.chunk(len(linears), -1)  # (BT*N,width/groups) each
        return torch.cat([linear(part) for linear, part in zip(linears, parts)], -1)


# ---------------------------------------------------------------- two streams, one backbone


def lavish_block(backbone, block, lav_v, lav_a, x_v, x_a):
    """One frozen block with its four adapters (Fig. 2). Tokens (BT,N,d) of both streams in and out.

    lav_v and lav_a: the visual and the audio stream's adapters, beside attention and beside the
    MLP, in this order. Beside attention an adapter reads the other stream's X, beside the MLP its
    Y. No stochastic depth, as the paper mentions none; the release has timm's default of 0.1 here
    (AVE/nets/net_trans.py:259,378)."""
    # To the frozen layers both streams are images: they pass as one batch, (2BT,N,d), with half as
    # many calls, and in bf16 on a CPU a tenth faster. (Of two passes torch 2.11 compiles wrong
    # gradients if sound's adapters read nothing.)
    msa_v, msa_a = backbone.msa(block, torch.cat([x_v, x_a])).chunk(2)  # (BT,N,d) each
    y_v = x_v + msa_v + lav_v[0](x_v, x_a)
    y_a = x_a + msa_a + lav_a[0](x_a, x_v)

    mlp_v, mlp_a = backbone.mlp(block, torch.cat([y_v, y_a])).chunk(2)
    z_v = y_v + mlp_v + lav_v[1](y_v, y_a)
    z_a = y_a + mlp_a + lav_a[1](y_a, y_v)
    return z_v, z_a


class Lavish(nn.Module):
    """A frozen backbone with adapters beside every residual branch (Fig. 2).

    frames (BT,3,S,S) normalised by ImageNet's mean and std, spectrograms (BT,S,S) from fbank
    -> (visual, audio), each a list over stages of tokens (BT,N,d), the last one after the
    final norm.

    one_direction: the audio stream's adapters read nothing; vision still reads sound.
    checkpoint_activations: compute each block again in the backward pass instead of keeping it.
    compile_blocks: torch.compile makes lavish_block faster, after minutes of compiling."""

    def __init__(
        self,
        backbone,
        latents=2,  # m, of each adapter
        reduction=8,  # r
        groups=2,
        one_direction=False,
        checkpoint_activations=False,
        compile_blocks=False,
    ):
        super().__init__()
        audio_latents = 0 if one_direction else latents
        self.backbone = backbone.requires_grad_(False)
        self.visual_adapters = make_adapters(backbone, latents, reduction, groups)
        self.audio_adapters = make_adapters(backbone, audio_latents, reduction, groups)
        self.run_block = lavish_block
        if compile_blocks:
            # One compiled function serves all blocks; their weights are its inputs. It is compiled
            # again for each stage and mode, and by default torch gives up after eight times.
            # The setting has this name in torch 2.6, and still in later versions.
            torch._dynamo.config.cache_size_limit = 64
            self.run_block = torch.compile(lavish_block)
        if checkpoint_activations:
            self.run_block = partial(checkpoint, self.run_block, use_reentrant=False)
            count_batches_once(self)

    def train(self, mode=True):
        nn.Module.train(self, mode)  # not super(): OneStream takes this function too
        self.backbone.eval()  # frozen means its batch statistics too
        return self

    def forward(self, frames, spectrograms):
        x_v = self.backbone.embed(frames)  # (BT,N,d)
        x_a = self.backbone.embed(three_channels(spectrograms))  # (BT,N,d)
        visual = []
        audio = []
        adapters = zip(self.visual_adapters, self.audio_adapters)
        for blocks, merge in self.backbone.stages:
            for block in blocks:
                lav_v, lav_a = next(adapters)  # of this block
                # (BT,N,d) each
                x_v, x_a = self.run_block(self.backbone, block, lav_v, lav_a, x_v, x_a)
            visual.append(x_v)
            audio.append(x_a)
            x_v = merge(x_v)  # (BT,N/4,2d)
            x_a = merge(x_a)
        visual[-1] = self.backbone.norm(visual[-1])
        audio[-1] = self.backbone.norm(audio[-1])
        return visual, audio


class OneStream(nn.Module):
    """One stream alone, as in Table 1: modality "v" sees the frames, "a" hears the spectrograms.

    In and out as Lavish, but the other stream's tokens are zeros: the head reads nothing in them.
    The adapters keep their ReLU; released AVE has none here (net_trans.py:158-170)."""

    train = Lavish.train  # the backbone stays in evaluation mode

    def __init__(self, backbone, modality, reduction=8, groups=2):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.modality = modality
        self.adapters = make_adapters(backbone, 0, reduction, groups)

    def forward(self, frames, spectrograms):
        images = frames if self.modality == "v" else three_channels(spectrograms)
        x = self.backbone.embed(images)  # (BT,N,d)
        tokens = []
        adapters = iter(self.adapters)
        for blocks, merge in self.backbone.stages:
            for block in blocks:
                lav = next(adapters)  # of this block, beside attention and beside the MLP
                # The brackets matter for rounding alone.
                x = x + (self.backbone.msa(block, x) + lav[0](x))
                x = x + (self.backbone.mlp(block, x) + lav[1](x))
            tokens.append(x)
            x = merge(x)  # (BT,N/4,2d)
        tokens[-1] = self.backbone.norm(tokens[-1])
        nothing = [torch.zeros_like(x) for x in tokens]
        if self.modality == "v":
            return tokens, nothing
        return nothing, tokens


def make_adapters(backbone, latents, reduction, groups):
    """One stream's adapters, [block][branch]: branch 0 is the attention, branch 1 the MLP."""
    adapters = nn.ModuleList()
    for (blocks, _), dim in zip(backbone.stages, backbone.dims):
        for _ in blocks:
            beside_attention = LavishAdapter(dim, latents, reduction, groups)
            beside_mlp = LavishAdapter(dim, latents, reduction, groups)
            adapters.append(nn.ModuleList([beside_attention, beside_mlp]))
    return adapters


def count_batches_once(net):
    """Recomputed blocks pass a batch through each batch norm twice. With the momentum a and the
    batch's value b, a running statistic moves by s <- (1 - a) s + a b. Two such steps with the
    momentum a' equal one with a if (1 - a')^2 = 1 - a."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 1 - (1 - module.momentum) ** 0.5


def three_channels(spectrograms):
    """(BT,S,S) -> (BT,3,S,S): to an image backbone sound is a grey picture."""
    return spectrograms[:, None].expand(-1, 3, -1, -1)


# ---------------------------------------------------------------- sound becomes an image

SAMPLE_RATE = 16000
# Mean and std of AVE's spectrograms at a 5.2 ms shift (AVE/dataloader.py:84-85). Other data and
# other sizes want their own: `python data.py stats`.
AVE_MEAN = -4.984795570373535
AVE_STD = 3.7079780101776123


def fbank(waveform, size=192, mean=AVE_MEAN, std=AVE_STD):
    """One second of sound as a log-mel image.

    waveform: (16000,) mono at 16 kHz, in [-1, 1]
    returns:  (size, size), rows are time and columns are mel bins, about zero mean and 0.5 std
    Raises ValueError for a waveform of another length."""
    if waveform.shape != (SAMPLE_RATE,):
        raise ValueError(f"fbank takes one second, ({SAMPLE_RATE},); got {tuple(waveform.shape)}")
    # A step is 998.4 ms / size: at 192 the supplementary's 5.2 ms. Kaldi rounds it to samples.
    # The other options are those of AVE/dataloader.py:171; windows of 25 ms are Kaldi's default.
    image = torchaudio.compliance.kaldi.fbank(
        waveform[None],
        sample_frequency=SAMPLE_RATE,
        num_mel_bins=size,
        frame_shift=998.4 / size,
        window_type="hanning",
        htk_compat=True,
    )  # (rows,size)
    # AST's convention: half a standard deviation (AVE/dataloader.py:174).
    image = (image - mean) / (2 * std)
    # The last window must end within the second, so that there are 188 rows at size 192. The four
    # rows that are missing are zeros after the normalisation: the mean level, which is not silence.
    return F.pad(image, (0, 0, 0, size - len(image)))


# ---------------------------------------------------------------- the tasks' heads
# Logits are float32 under autocast too, because the losses need it.


class AVE(nn.Module):
    """Audio-visual event localisation: which event is seen and heard in each second (Sec. 4.1).

    frames (B,T,3,S,S), spectrograms (B,T,S,S) -> logits (B,T,classes), the last class background
    extra_width: width of extra features of the sound (B,T,extra_width); VGGish has 128 (suppl.
    Table 3)"""

    def __init__(
        self,
        net,
        classes=29,  # 28 events and the background
        extra_width=0,
    ):
        super().__init__()
        self.net = net
        width = 2 * net.backbone.dims[-1] + extra_width
        # Two linear layers with nothing between them (AVE/nets/net_trans.py:420-421): linear in
        # the two streams' features, so that any interaction must happen in the adapters.
        self.head = nn.Sequential(nn.Linear(width, 512), nn.Linear(512, classes))

    def forward(self, frames, spectrograms, extra=None):
        features = features_of(self.net, frames, spectrograms)  # (B,T,2d)
        if extra is not None:
            features = torch.cat([features, extra], -1)  # (B,T,2d+extra_width)
        return self.head(features).float()


def features_of(net, frames, spectrograms):
    """frames (B,T,3,S,S), spectrograms (B,T,S,S) -> (B,T,2d): what stands for each image, both
    streams side by side."""
    vectors = []
    for tokens in net(frames.flatten(0, 1), spectrograms.flatten(0, 1)):
        vectors.append(image_vectors(net.backbone, tokens[-1]))  # (BT,d)
    return torch.cat(vectors, -1).unflatten(0, (len(frames), -1))


def image_vectors(backbone, tokens):
    """(BT,N,d) -> (BT,d): a ViT's class token, or the mean over the tokens."""
    return tokens[:, 0] if hasattr(backbone, "class_token") else tokens.mean(1)


class UCF101(nn.Module):
    """Action recognition (Table 2 of the supplementary): what is done in a clip.

    frames (B,16,3,S,S), spectrograms (B,8,S,S), one per two frames -> logits (B,classes)"""

    def __init__(self, net, classes=101):
        super().__init__()
        self.net = net
        self.head = nn.Linear(2 * net.backbone.dims[-1], classes)

    def forward(self, frames, spectrograms):
        spectrograms = spectrograms.repeat_interleave(2, 1)  # (B,16,S,S)
        # VideoMAE has one vector for a clip, a backbone of images has 16.
        features = features_of(self.net, frames, spectrograms).mean(1)  # (B,2d)
        return self.head(features).float()


class AVS(nn.Module):
    """Audio-visual segmentation: a mask of what sounds, by AVSBench's decoder (Sec. 4.1).

    frames (B,T,3,S,S), spectrograms (B,T,S,S) -> mask logits (B,T,mask_size,mask_size); T is 1
    with first_only=True, which is all that the loss of S4 looks at (avs_s4/loss.py:17-24).
    tpavi: AVSBench's own audio-visual block too. The paper's parameter count has none, nor has the
    command of the released README (avs_s4/base_options.py:36); avs_s4/train.sh:21 has it.
    Widths, dilations and the start of the convolutions are those of AVSBench's PVT decoder. The
    backbone must have several stages."""

    def __init__(
        self,
        net,
        mask_size=224,  # pixels a side
        channels=256,  # of the maps that are added; a multiple of 8
        tpavi=False,
    ):
        super().__init__()
        self.net = net
        self.mask_size = mask_size
        dims = net.backbone.dims
        # 64, 128, 320, 512 by default
        widths = [channels // 4, channels // 2, channels * 5 // 4, channels * 2]
        self.project = nn.ModuleList(nn.Linear(dim, width) for dim, width in zip(dims, widths))
        self.context = nn.ModuleList(DilatedContext(w, channels) for w in widths[: len(dims)])
        self.tpavi = None
        if tpavi:
            self.audio = nn.Linear(dims[-1], 128)  # TPAVI was made for VGGish's 128
            self.tpavi = nn.ModuleList(TPAVI(channels) for _ in dims)
        # The coarsest map has nothing to be added to; the released unit for it is never used.
        self.skip = nn.ModuleList(ResidualUnit(channels) for _ in dims[1:])
        self.fuse = nn.ModuleList(ResidualUnit(channels) for _ in dims)
        self.mask = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.Upsample(mask_size, mode="bilinear"),
            nn.Conv2d(channels // 2, channels // 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels // 8, 1, 1),
        )

    def forward(self, frames, spectrograms, first_only=False):
        B, T = frames.shape[:2]
        visual, audio = self.net(frames.flatten(0, 1), spectrograms.flatten(0, 1))
        # Frames without a loss are left out as early as can be: before the decoder, or after TPAVI,
        # which alone mixes frames.
        step = T if first_only else 1
        if self.tpavi is None:
            visual = [tokens[::step] for tokens in visual]
        else:
            sound = self.audio(audio[-1].mean(1))  # (BT,128)
            sound = sound.unflatten(0, (B, T))
        x = None  # the decoded map, (BT,C,side,side)
        for i in reversed(range(len(visual))):  # from coarse to fine
            # Swin's maps are S/4, S/8 ... wide, the decoder's mask_size / 4, / 8 ...
            side = self.mask_size // 2 ** (i + 2)
            y = to_maps(self.project[i](visual[i]))  # (BT,w,H,H), with first_only (B,w,H,H)
            y = F.interpolate(y, side, mode="bicubic")  # (BT,w,side,side)
            y = self.context[i](y)  # (BT,C,side,side)
            if self.tpavi is not None:
                y = self.tpavi[i](y, sound)
                y = y[::step]
            if x is not None:
                y = x + self.skip[i](y)
            y = self.fuse[i](y)
            # Twice as wide, for the next finer map: mask_size / 2, / 4 ...
            wider = self.mask_size // 2 ** (i + 1)
            x = F.interpolate(y, wider, mode="bilinear", align_corners=True)
        logits = self.mask(x).squeeze(1)  # (BT,mask,mask)
        return logits.unflatten(0, (B, -1)).float()


def to_maps(tokens):
    """(BT,H*H,d) -> (BT,d,H,H)"""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def to_tokens(maps):
    """(BT,d,H,H) -> (BT,H*H,d), and of clips (B,d,8,H,H) -> (B,8*H*H,d)"""
    return maps.flatten(2).transpose(1, 2)


class DilatedContext(nn.Module):
    """The sum of four convolutions that look 3, 6, 12, 18 pixels far: (BT,w,H,H) -> (BT,C,H,H)."""

    def __init__(self, width, channels):
        super().__init__()
        self.convs = nn.ModuleList()
        for reach in (3, 6, 12, 18):
            conv = nn.Conv2d(width, channels, 3, padding=reach, dilation=reach)
            nn.init.normal_(conv.weight, std=0.01)
            self.convs.append(conv)

    def forward(self, x):
        return sum(conv(x) for conv in self.convs)


class ResidualUnit(nn.Module):
    """relu(x) + conv(relu(conv(relu(x)))): the shortcut is rectified too, because the released
    unit's first relu works in place (AVS PVT_AVSModel.py:205)."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        x = x.relu()
        return x + self.conv2(self.conv1(x).relu())


class TPAVI(nn.Module):
    """Temporal pixel-wise audio-visual interaction (AVSBench, ECCV 2022): every pixel of a clip
    reads all others, weighted by how its theta agrees with the sound phi of their frame.

    x (BT,C,H,W), sound (B,T,128) -> z (BT,C,H,W); for pixel p of frame t, over T frames of
    P = H W pixels,

        y_tp = 1/(TP) sum_t'p' (theta_tp . phi_t') g_t'p'            z = LN(x + BN(W y))

    As published, this forms the TP x TP weights (983 MB at 5 frames of 56 x 56). But no softmax
    stands between the two products and phi is one per frame, so the sums may change places:

        y_tp = theta_tp [1/T sum_t' phi_t'^T gbar_t'],    gbar_t = mean_p g(x_tp) = g(mean_p x_tp)
    """

    def __init__(self, channels):
        super().__init__()
        self.align = nn.Linear(128, channels)
        self.theta = nn.Linear(channels, channels // 2)
        self.phi = nn.Linear(channels, channels // 2)
        self.g = nn.Linear(channels, channels // 2)
        self.out = nn.Linear(channels // 2, channels)
        self.bn = nn.BatchNorm1d(channels)
        self.norm = nn.LayerNorm(channels)
        nn.init.zeros_(self.bn.weight)  # at the start the sound has no say: z = LN(x)

    def forward(self, x, sound):
        B, T, _ = sound.shape
        x = x.movedim(1, -1)  # (BT,H,W,C)
        phi = self.phi(self.align(sound))  # (B,T,C/2)
        gbar = self.g(x.mean((1, 2))).view(B, T, -1)  # (B,T,C/2)
        kernel = phi.transpose(1, 2) @ gbar / T  # (B,C/2,C/2)
        theta = self.theta(x).reshape(B, -1, kernel.shape[1])  # (B,T*H*W,C/2)
        y = self.out(theta @ kernel)  # (B,T*H*W,C)
        y = self.bn(y.flatten(0, 1)).view(x.shape)  # (BT,H,W,C)
        return self.norm(x + y).movedim(-1, 1)


class AVQA(nn.Module):
    """Audio-visual question answering, with the head of MUSIC-AVQA (Li et al., CVPR 2022).

    frames (B,T,3,S,S), spectrograms (B,T,S,S), question (B,W) word indices,
    negatives (B,T,3,S,S): frames of other videos, in training with both streams
    -> answer logits (B,answers), match logits (2*BT,2): the clip's own frames first, class 1 "this
    frame goes with this sound"; None without negatives."""

    def __init__(
        self,
        net,
        words=93,  # of the vocabulary, with the padding
        answers=42,
        hidden=512,  # D; a multiple of 4, the heads of the attention
    ):
        super().__init__()
        self.net = net
        dim = net.backbone.dims[-1]
        self.embedding = nn.Embedding(words, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.question = nn.Linear(2 * hidden, hidden)
        self.audio_in = nn.Linear(dim, hidden)
        self.audio_out = nn.Linear(hidden, hidden)
        self.visual_in = nn.Linear(dim, hidden)
        self.visual_out = nn.Linear(2 * hidden, hidden)
        self.when_heard = TemporalGrounding(hidden)
        self.when_seen = TemporalGrounding(hidden)
        self.match = torchvision.ops.MLP(2 * hidden, [hidden, hidden // 2, hidden // 4, 2])
        self.fusion = nn.Linear(2 * hidden, hidden)
        self.answer = nn.Linear(hidden, answers)

    def forward(self, frames, spectrograms, question, negatives=None):
        B = len(question)
        visual, audio = self.net(frames.flatten(0, 1), spectrograms.flatten(0, 1))
        asked = self.encode(question)  # (B,D)
        heard = self.audio_out(self.audio_in(audio[-1].mean(1)).relu())  # (BT,D)
        seen = self.ground(visual[-1], heard)  # (BT,D)
        when_heard = self.when_heard(asked, heard.unflatten(0, (B, -1)))  # (B,D)
        when_seen = self.when_seen(asked, seen.unflatten(0, (B, -1)))  # (B,D)
        fused = torch.cat([when_heard, when_seen], -1)  # (B,2D)
        fused = self.fusion(fused.tanh())  # (B,D)
        answer = self.answer((asked * fused).tanh()).float()  # (B,answers)
        if negatives is None:
            return answer, None
        # Through the frozen backbone without adapters (AVQA/net_grd_avst/net_avst.py:365-368).
        with torch.no_grad():
            foreign = self.net.backbone(negatives.flatten(0, 1))[-1]  # (BT,N,d)
        own = torch.cat([heard, seen], -1)  # (BT,2D)
        mismatched = torch.cat([heard, self.ground(foreign, heard)], -1)  # (BT,2D)
        return answer, self.match(torch.cat([own, mismatched])).float()  # (2*BT,2)

    def encode(self, question):
        """Word indices (B,W) -> (B,D). The LSTM reads the padding too (net_avst.py:190-195), so
        that W must be one number for all questions."""
        # CPUs without bf16 instructions have no LSTM in bf16, so it stays out of autocast.
        with torch.autocast(question.device.type, enabled=False):
            _, (h, c) = self.lstm(self.embedding(question).tanh())  # (1,B,D) each
        memory = torch.cat([h[0], c[0]], -1)  # (B,2D)
        return self.question(memory.tanh())

    def ground(self, visual, heard):
        """Grounding in space: tokens (BT,N,d), sound (BT,D) -> (BT,D). Two views side by side: the
        mean of the tokens, and sum_n softmax_n(cos(a, v_n)) v_n / |v_n|, where the sound is."""
        tokens = self.visual_in(visual)  # (BT,N,D)
        unit = F.normalize(tokens, dim=-1)
        cosine = unit @ F.normalize(heard, dim=-1)[..., None]  # (BT,N,1)
        grounded = (cosine.softmax(1) * unit).sum(1)  # (BT,D)
        views = torch.cat([tokens.mean(1), grounded], -1)  # (BT,2D)
        return self.visual_out(views.tanh())


class TemporalGrounding(nn.Module):
    """Grounding in time: the question (B,D) attends to the seconds (B,T,D) of one stream -> (B,D).
    Heads and dropout are MUSIC-AVQA's (net_avst.py:228-241)."""

    def __init__(self, hidden):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden, 4, dropout=0.1, batch_first=True)
        self.mlp = torchvision.ops.MLP(hidden, [hidden, hidden], dropout=0.1)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, question, seconds):
        z, _ = self.attention(question[:, None], seconds, seconds, need_weights=False)
        z = z[:, 0]  # (B,D)
        # LN(z + MLP(z)) + mean_t s_t: the mean keeps what every second says, asked for or not.
        return self.norm(z + self.mlp(z)) + seconds.mean(1)


# ---------------------------------------------------------------- what a backbone is
# What the nets above need of a backbone, so that another one can take Swin's place:
#     embed(images (BT,3,S,S)) -> tokens (BT,N,d)
#     stages: list of (blocks, merge), merge going from this stage's tokens to the next one's
#     msa(block, x), mlp(block, x): what attention and MLP of a block add to x
#     norm: the last norm, if any; dims: token widths of the stages; image_size: S
#     class_token: only if token 0 stands for the whole image (see image_vectors)


def frozen_forward(backbone, images):
    """The backbone alone: images (BT,3,S,S) -> list of tokens (BT,N,d) at the end of each stage,
    before merging, the last one after the final norm."""
    x = backbone.embed(images)  # (BT,N,d)
    tokens = []
    for blocks, merge in backbone.stages:
        for block in blocks:
            x = x + backbone.msa(block, x)
            x = x + backbone.mlp(block, x)
        tokens.append(x)
        x = merge(x)  # (BT,N/4,2d)
    tokens[-1] = backbone.norm(tokens[-1])
    return tokens


# ---------------------------------------------------------------- the frozen backbone: Swin-V2


class SwinV2(nn.Module):
    """Swin Transformer V2 (Liu et al., CVPR 2022) for square images of one size.

    images (BT,3,S,S) -> tokens of the stages, (BT,(S/4)^2,d), (BT,(S/8)^2,2d), ...

    A stage narrower than the window gets one window of its own width, unshifted (Microsoft's rule;
    torchvision pads instead and attends to the padding). Parameters have torchvision's names.
    At another image size a stage may have other windows, which published weights do not fit."""

    forward = frozen_forward

    def __init__(
        self,
        embed_dim,  # width of the first stage; each other one has twice that of the one before
        depths,  # blocks of each stage
        num_heads,  # of each stage
        window_size,  # in tokens
        image_size,  # in pixels
    ):
        super().__init__()
        self.image_size = image_size
        self.dims = [embed_dim * 2**i for i in range(len(depths))]
        patches = nn.Conv2d(3, embed_dim, 4, 4)
        channels_last = torchvision.ops.Permute([0, 2, 3, 1])
        self.features = nn.ModuleList()
        self.features.append(nn.Sequential(patches, channels_last, nn.LayerNorm(embed_dim)))
        for i, dim in enumerate(self.dims):
            if i > 0:
                self.features.append(PatchMerging(dim // 2))
            side, remainder = divmod(image_size, 4 * 2**i)  # tokens in a row of the image
            window = min(window_size, side)
            require(
                remainder == 0 and window > 1 and side % window == 0,
                f"image size {image_size} does not divide into windows of {window_size}; "
                f"{window_size * 2 ** len(depths)} and multiples of "
                f"{window_size * 2 ** (len(depths) + 1)} do",
            )
            blocks = nn.ModuleList()
            for j in range(depths[i]):
                # Every second block shifts its windows by half, if there is more than one.
                shift = window // 2 if j % 2 == 1 and side > window else 0
                blocks.append(SwinBlock(dim, num_heads[i], side, window, shift))
            self.features.append(blocks)
        self.norm = nn.LayerNorm(self.dims[-1])
        merges = [*self.features[2::2], nn.Identity()]
        self.stages = list(zip(self.features[1::2], merges))
        # Trained from scratch it must start close to the identity: with norm1 and norm2 starting at
        # 1, as usual, it does not learn. Linear layers start as torchvision's.
        for name, parameter in self.features[1:].named_parameters():
            if parameter.dim() == 2:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif "norm1.weight" in name or "norm2.weight" in name:
                nn.init.constant_(parameter, 0.2)
            elif "bias" in name:
                nn.init.zeros_(parameter)

    def embed(self, images):
        return self.features[0](images).flatten(1, 2)  # (BT,(S/4)^2,d)

    def msa(self, block, x):
        return block.norm1(block.attn(x))

    def mlp(self, block, x):
        return block.norm2(block.mlp(x))


class SwinBlock(nn.Module):
    """Residual-post-norm: x <- x + norm1(attn(x)), then x <- x + norm2(mlp(x))."""

    def __init__(self, dim, heads, side, window, shift):
        super().__init__()
        self.attn = WindowAttention(dim, heads, side, window, shift)
        self.mlp = torchvision.ops.MLP(dim, [4 * dim, dim], activation_layer=nn.GELU)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)


class WindowAttention(nn.Module):
    """Swin-V2's attention (Liu et al. 2022): cosine, within windows, log-spaced position bias.

        softmax(cos(q, k) / tau + 16 sigmoid(MLP(log-spaced offset))) v,   1 / tau <= 100

    tokens (BT, side*side, dim) -> (BT, side*side, dim). The parameters have
    torchvision's names; logit_scale is log(1/tau), cpb_mlp makes the position bias."""

    def __init__(
        self,
        dim,
        heads,
        side,  # tokens in a row of the image
        window,  # tokens in a row of a window
        shift,  # by how many tokens the windows are shifted
    ):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(heads, 1, 1)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False)
        )
        # Token numbers: W windows of n = w*w tokens, row by row, after the image was rolled up and
        # left by `shift`.
        tokens = torch.arange(side * side).view(1, side, side)
        tokens = tokens.roll((-shift, -shift), (1, 2))
        windows = F.pixel_unshuffle(tokens, window).flatten(1).T  # (W,n)
        order = windows.flatten()
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse", order.argsort(), persistent=False)

        # Rows and columns between two tokens of a window. If they are w or more, only the cyclic
        # shift made the two neighbours: the mask separates them.
        places = torch.stack([windows // side, windows % side], -1)  # (W,n,2): row, column
        away = places[:, :, None] - places[:, None]  # (W,n,n,2)
        mask = -100.0 * (away.abs() >= window).any(-1)  # (W,n,n)
        self.register_buffer("mask", mask, persistent=False)

        # What the bias is made of: all offsets, -(w-1) to w-1 rows and the same for columns, on a
        # log scale from -1.06 to 1.06; for each pair of a window's tokens the number of its offset.
        offsets = torch.arange(1 - window, window, dtype=torch.float32)  # (2w-1,)
        offsets = offsets / (window - 1) * 8
        offsets = offsets.sign() * torch.log2(offsets.abs() + 1) / 3
        table = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)  # (2w-1,2w-1,2)
        rows, columns = (away[0] + window - 1).unbind(-1)  # (n,n) each, from 0; all windows alike
        index = rows * (2 * window - 1) + columns
        self.register_buffer("relative_coords_table", table[None])
        self.register_buffer("relative_position_index", index.flatten())

    def forward(self, x):
        BT, N, C = x.shape
        W, n, _ = self.mask.shape  # W windows of n tokens
        x = x.index_select(1, self.order)  # window after window
        # Keys have no bias: a softmax cancels it in plain attention, but not with the cosine.
        q_bias, _, v_bias = self.qkv.bias.chunk(3)
        qkv_bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)  # (BT,N,3C)
        qkv = qkv.view(BT, W, n, 3, self.heads, -1).unbind(3)  # (BT,W,n,heads,C/heads) each
        # Copied here, once, into the order in which all that follows reads them.
        q, k, v = (z.transpose(2, 3).contiguous() for z in qkv)  # (BT,W,heads,n,C/heads) each

        # Cosine attention: unit vectors, and a learned temperature instead of 1/sqrt(d).
        scale = self.logit_scale.clamp(max=math.log(100)).exp()  # (heads,1,1)
        q = F.normalize(q, dim=-1) * scale
        k = F.normalize(k, dim=-1)
        # The position bias at full precision, and -100 across the seam of the shift.
        with torch.autocast(x.device.type, enabled=False):
            table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)  # ((2w-1)^2,heads)
            bias = table[self.relative_position_index].view(n, n, -1)  # (n,n,heads)
            bias = 16 * bias.permute(2, 0, 1).contiguous().sigmoid()  # (heads,n,n)
            bias = bias + self.mask[:, None]  # (W,heads,n,n)
        bias = bias.to(v.dtype)
        if x.is_cuda:  # one kernel for the two lines below; it takes four dimensions
            q, k, v = (z.flatten(1, 2) for z in (q, k, v))  # (BT,W*heads,n,C/heads) each
            x = F.scaled_dot_product_attention(q, k, v, bias.flatten(0, 1), scale=1.0)
            x = x.unflatten(1, (W, -1))  # (BT,W,heads,n,C/heads)
        else:
            scores = q @ k.transpose(-2, -1)  # (BT,W,heads,n,n)
            scores += bias  # in place, as nothing else is as large
            x = scores.softmax(-1) @ v  # (BT,W,heads,n,C/heads)
        x = x.transpose(2, 3).reshape(BT, N, C)
        x = self.proj(x)
        return x.index_select(1, self.inverse)


class PatchMerging(torchvision.models.swin_transformer.PatchMergingV2):
    """Each 2 x 2 tokens become one of twice the width: (BT, side^2, d) -> (BT, side^2 / 4, 2d)."""

    def forward(self, x):
        x = to_maps(x).movedim(1, -1)  # (BT,H,H,d)
        return super().forward(x).flatten(1, 2)


# ---------------------------------------------------------------- the supplementary's backbones


class ViT(torchvision.models.VisionTransformer):
    """Vision Transformer (Dosovitskiy et al., ICLR 2021): one stage, class token first. Pre-norm:
    x <- x + attn(norm1(x)), then x <- x + mlp(norm2(x))."""

    forward = frozen_forward

    def __init__(self, layers, num_heads, dim, image_size, patch=16):
        fits = image_size > 0 and image_size % patch == 0
        require(fits, f"image size {image_size} is no multiple of {patch}")
        super().__init__(image_size, patch, layers, num_heads, dim, 4 * dim)
        self.heads = nn.Identity()  # no classifier
        self.dims = [dim]
        self.stages = [(self.encoder.layers, nn.Identity())]

    def norm(self, x):
        return self.encoder.ln(x)

    def embed(self, images):
        patches = self._process_input(images)  # (BT,(S/patch)^2,d)
        class_token = self.class_token.expand(len(images), -1, -1)  # (BT,1,d)
        return torch.cat([class_token, patches], 1) + self.encoder.pos_embedding

    def msa(self, block, x):
        z = block.ln_1(x)
        z, _ = block.self_attention(z, z, z, need_weights=False)
        return z

    def mlp(self, block, x):
        return block.mlp(block.ln_2(x))


class VideoMAE(ViT):
    """VideoMAE's encoder (Tong et al., NeurIPS 2022): one token per tubelet, 2 frames of 16 x 16
    pixels; fixed sine positions, no class token. 16 images in a row are taken as one clip. Each
    spectrogram is given twice in a row, because a tubelet spans two frames."""

    def __init__(self, layers, num_heads, dim, image_size):
        super().__init__(layers, num_heads, dim, image_size)
        del self.class_token
        del self.encoder.pos_embedding
        tubelet = (2, 16, 16)
        self.conv_proj = nn.Conv3d(3, dim, tubelet, tubelet)
        tokens = 8 * (image_size // 16) ** 2
        # In double precision, as the authors make them: a float32 angle of 1568 is 1e-4 off.
        wavelengths = 10000 ** (torch.arange(0, dim, 2, dtype=torch.double) / dim)  # (d/2,)
        angles = torch.arange(tokens)[:, None] / wavelengths  # (N,d/2)
        positions = torch.stack([angles.sin(), angles.cos()], -1)  # (N,d/2,2)
        self.register_buffer("positions", positions.flatten(1).float(), persistent=False)

    def embed(self, images):
        clips = images.unflatten(0, (-1, 16)).transpose(1, 2)  # (B,3,16,S,S)
        x = self.conv_proj(clips)  # (B,d,8,S/16,S/16)
        return to_tokens(x) + self.positions  # (B,8*(S/16)^2,d)


class ResNet(nn.Module):
    """ResNet (He et al., CVPR 2016) of bottlenecks, x <- relu(x + f(x)); tokens are the places of
    its maps. Its first bottleneck of each layer changes the width: it stands where Swin merges.

    Neither paper nor release says where the adapters stood (what is left of it, released AVE
    net_trans_v2.py:558-597, has none). Here a bottleneck is a block whose MLP adds nothing, so that
    two adapters stand beside it, one after the other, as beside the blocks of the others."""

    forward = frozen_forward

    def __init__(
        self,
        depths,  # bottlenecks of each layer
        width,  # of the first convolution; the layers have 4, 8 ... times as much
        image_size,
    ):
        super().__init__()
        step = 2 ** (len(depths) + 1)  # pixels that become one place of the coarsest map
        fits = image_size > 0 and image_size % step == 0
        require(fits, f"image size {image_size} is no multiple of {step}")
        self.image_size = image_size
        self.dims = [4 * width * 2**i for i in range(len(depths))]
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layers = nn.ModuleDict()
        inside = width
        for i, (depth, dim) in enumerate(zip(depths, self.dims)):
            first = WideningBottleneck(inside, dim, stride=1 if i == 0 else 2)
            others = [Bottleneck(dim, dim // 4) for _ in range(depth - 1)]
            self.layers[f"layer{i + 1}"] = nn.Sequential(first, *others)
            inside = dim
        layers = list(self.layers.values())
        merges = [layer[0] for layer in layers[1:]] + [nn.Identity()]
        self.stages = [(layer[1:], merge) for layer, merge in zip(layers, merges)]
        self.norm = nn.Identity()

    def embed(self, images):
        x = self.bn1(self.conv1(images)).relu()  # (BT,width,S/2,S/2)
        x = F.max_pool2d(x, 3, 2, 1)  # (BT,width,S/4,S/4)
        return self.layers["layer1"][0](to_tokens(x))  # (BT,(S/4)^2,4 width)

    def msa(self, block, x):
        z = block(to_maps(x))  # (BT,C,H,H)
        return to_tokens(z) - x

    def mlp(self, block, x):
        return torch.zeros_like(x)


class WideningBottleneck(Bottleneck):
    """A bottleneck of another width and stride: tokens (BT,N,d) -> (BT,N/stride^2,dim)."""

    def __init__(self, inside, dim, stride):
        shortcut = nn.Sequential(nn.Conv2d(inside, dim, 1, stride, bias=False), nn.BatchNorm2d(dim))
        super().__init__(inside, dim // 4, stride, shortcut)

    def forward(self, x):
        return to_tokens(super().forward(to_maps(x)))


# ---------------------------------------------------------------- backbones and weights by name

SWIN_B = (128, (2, 2, 18, 2), (4, 8, 16, 32))
TORCH = "https://download.pytorch.org/models"
MICROSOFT = "https://github.com/SwinTransformer/storage/releases/download/v2.0.0"
BACKBONES = {  # name: (class, its settings, image size and address of the published weights)
    "nano": (SwinV2, (32, (1, 1, 1), (2, 4, 8), 4), 32, None),  # the toys'
    "tiny": (
        SwinV2,
        (96, (2, 2, 6, 2), (3, 6, 12, 24), 8),
        256,
        f"{TORCH}/swin_v2_t-b137f0e2.pth",
    ),
    "base": (SwinV2, (*SWIN_B, 8), 256, f"{TORCH}/swin_v2_b-781e5279.pth"),
    "base12": (
        SwinV2,
        (*SWIN_B, 12),
        192,
        f"{MICROSOFT}/swinv2_base_patch4_window12_192_22k.pth",
    ),
    "large": (  # the paper's
        SwinV2,
        (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
        192,
        f"{MICROSOFT}/swinv2_large_patch4_window12_192_22k.pth",
    ),
    "vit_tiny": (ViT, (12, 3, 192), 224, None),
    "vit_small": (ViT, (12, 6, 384), 224, None),
    "vit_base": (ViT, (12, 12, 768), 224, f"{TORCH}/vit_b_16-c867db91.pth"),
    "vit_large": (ViT, (24, 16, 1024), 224, f"{TORCH}/vit_l_16-852ce7e3.pth"),
    "vit_nano": (partial(ViT, patch=8), (4, 4, 80), 32, None),  # about as many parameters as nano
    "resnet152": (ResNet, ((3, 8, 36, 3), 64), 224, f"{TORCH}/resnet152-394f9c45.pth"),
    "resnet_nano": (ResNet, ((2, 2, 2), 20), 32, None),
    "videomae": (VideoMAE, (12, 12, 768), 224, None),
    "videomae_nano": (VideoMAE, (4, 4, 64), 32, None),  # the toy's
}


def make_backbone(name, image_size=None):
    """A backbone with random weights, by name (a key of BACKBONES), for images of the size it was
    published for unless told."""
    require(name in BACKBONES, f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}")
    kind, settings, published_size, _ = BACKBONES[name]
    return kind(*settings, image_size or published_size)


# Names that are skipped: classifiers, decoders, buffers that follow from the window, counters of
# batch norms, and values' biases, which are joined to those of the queries below.
UNUSED = (
    "^head|^fc[.]|^decoder|^mask_token|^encoder_to"
    "|relative_position|attn_mask|batches_tracked|v_bias$"
)
MLP_NAMES = [
    (r"mlp\.(fc|linear_)1", "mlp.0"),
    (r"mlp\.(fc|linear_)2", "mlp.3"),
]
# timm's and VideoMAE's names -> torchvision's. A fine-tuned VideoMAE applies fc_norm to the mean of
# its tokens; here it is the last norm, before the mean.
VIT_NAMES = [
    (r"^encoder\.(?=patch_embed|blocks|norm)", ""),
    (r"^patch_embed\.proj", "conv_proj"),
    (r"^cls_token", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^blocks\.", "encoder.layers.encoder_layer_"),
    (r"\.norm([12])", r".ln_\1"),
    (r"^(fc_)?norm\.", "encoder.ln."),
    (r"attn\.qkv\.", "self_attention.in_proj_"),
    (r"attn\.proj", "self_attention.out_proj"),
]


def names_elsewhere(backbone, tensors):
    """[(pattern, ours)] of the names that tensors have in the files of other publishers."""
    if isinstance(backbone, ViT):
        return MLP_NAMES + VIT_NAMES
    if isinstance(backbone, ResNet):
        return [(r"^layer(?=\d)", "layers.layer")]
    # Microsoft's and timm's Swin-V2; timm from 0.9 on has the merging at the start of the next
    # stage.
    merge = 2 if "layers.0.downsample.norm.weight" in tensors else 0
    names = [
        ("patch_embed.proj", "features.0.0"),
        ("patch_embed.norm", "features.0.2"),
    ]
    for i in range(4):
        names.append((f"layers.{i}.blocks", f"features.{2 * i + 1}"))
        names.append((f"layers.{i}.downsample", f"features.{2 * i + merge}"))
    return MLP_NAMES + names


def load_pretrained(backbone, weights):
    """Load weights under their publisher's names. Raises InputError for what does not fit."""
    for key in ("model", "module", "state_dict", "model_state_dict", "state_dict_ema", "teacher"):
        if isinstance(weights, dict) and key in weights:
            weights = weights[key]
    require(isinstance(weights, dict), f"the file of weights holds a {type(weights).__name__}")
    tensors = {}
    for name, tensor in weights.items():
        if torch.is_tensor(tensor):  # not the number of an epoch, for example
            # Prefixes that DataParallel, torch.compile and larger models put before a name.
            name = re.sub(r"^((module|_orig_mod|backbone)\.)+", "", str(name))
            tensors[name] = tensor
    wanted = list(backbone.state_dict())[:1]
    found = list(weights)[:3]
    require(tensors, f"the file of weights holds no tensors by name, as {wanted}, but {found}")
    names = names_elsewhere(backbone, tensors)
    state = {}
    for name, tensor in tensors.items():
        if re.search(UNUSED, name):
            continue
        if name.endswith("q_bias"):  # Microsoft and VideoMAE store queries' and values' apart
            v_bias = tensors.get(name.replace("q_bias", "v_bias"), tensor[:0])
            tensor = torch.cat([tensor, torch.zeros_like(tensor), v_bias])
            name = name.replace("q_bias", "qkv.bias")
        for pattern, ours in names:
            name = re.sub(pattern, ours, name)
        state[name] = tensor
    for name, tensor in backbone.state_dict().items():
        # Weights for another window could be loaded, but would give wrong tokens. The files of
        # Microsoft and torchvision hold a table of offsets for each block, which tells its window;
        # timm's do not.
        if name.endswith("relative_coords_table"):
            theirs = state.get(name, tensor)  # (1,2w-1,2w-1,2)
            same = theirs.shape == tensor.shape and (theirs - tensor).abs().max() < 1e-3
            window = (math.isqrt(theirs.numel() // 2) + 1) // 2
            require(same, f"the weights of {name} are of another window (of {window} tokens)")
        if re.search(UNUSED + "|relative_coords", name):
            state[name] = tensor  # stays as it is
    load_checked(backbone, state, "the weights do not fit this backbone")


# ---------------------------------------------------------------- freezing, saving, loading


def freeze_all_but_adapters(model):
    """Leave only the LavishAdapters of a model trainable (then unfreeze the head by hand)."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LavishAdapter):
            module.requires_grad_(True)


def trained_state_dict(model):
    """What training changed, and no more: 40 MB beside a Swin-V2-L of 900. A module that owns a
    trainable parameter is kept with its buffers (batch-norm statistics)."""
    owners = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] in owners}


def load_trained_state_dict(model, state):
    """The inverse of trained_state_dict. Raises InputError that names a key that does not fit."""
    frozen = model.state_dict()
    for name in trained_state_dict(model):
        del frozen[name]
    load_checked(model, frozen | state, "the checkpoint is of another configuration")


def count_parameters(model):
    """(trainable, total)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- errors


class InputError(ValueError):
    """Something the user can mend. One line: which file or option, what is wrong, what to do."""


def require(condition, message):
    """InputError unless the condition holds."""
    if not condition:
        raise InputError(message)


def load_checked(model, state, what):
    """load_state_dict. Raises InputError that names what is missing, what is extra, or a shape."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # torch has a line for all that is missing, one for all that is extra, one for each shape.
        faults = [line.strip()[:160] for line in str(error).splitlines()[1:3]]
        raise InputError(f"{what}: {' '.join(faults)}") from None


# ---------------------------------------------------------------- one clip, and the parameters


def follow_a_clip():
    """Print the shapes of one toy-sized clip at each station from input to logits."""
    model = AVE(Lavish(make_backbone("nano")), classes=7).eval()
    size = model.net.backbone.image_size
    frames = torch.randn(1, 10, 3, size, size)
    spectrograms = torch.randn(1, 10, size, size)
    visual, _ = model.net(frames[0], spectrograms[0])
    features = features_of(model.net, frames, spectrograms)
    print("One clip of ten seconds through the nano net")
    print(f"    frames                  {tuple(frames.shape)}")
    print(f"    spectrograms            {tuple(spectrograms.shape)}")
    for stage, tokens in enumerate(visual, 1):
        print(f"    stage {stage}, either stream  {tuple(tokens.shape)}")
    print(f"    pooled, both streams    {tuple(features.shape)}")
    print(f"    logits                  {tuple(model(frames, spectrograms).shape)}")


PAPERS_COUNTS = """
    AVE        large      2/8/2    10.1  238.8
    AVE        base12     2/8/2     5.0  114.2
    AVE        vit_base   2/8/2     4.7  107.2
    AVE        vit_large  2/8/2    14.5  340.1
    AVE        resnet152  2/8/2       -      -
    AVS        large     16/4/2    37.2  266.4
    AVS+TPAVI  large     16/4/2       -      -
    AVQA       large     16/4/2    21.1  249.8
    AVQA       large     64/8/4    21.1  249.8
    UCF101     videomae   2/4/2     7.4      -
"""


def count_the_papers():
    """Print the parameters of the paper's configurations, in millions, beside the paper's."""
    heads = {
        "AVE": AVE,
        "AVS": AVS,
        "AVS+TPAVI": partial(AVS, tpavi=True),
        "AVQA": AVQA,
        "UCF101": UCF101,
    }
    print("\nhead      backbone  m/r/groups adapters   head trainable  paper    total  paper")
    for line in PAPERS_COUNTS.strip().splitlines():
        task, name, sizes, paper_trained, paper_total = line.split()
        latents, reduction, groups = map(int, sizes.split("/"))
        with torch.device("meta"):  # shapes without memory
            net = Lavish(make_backbone(name), latents, reduction, groups)
            model = heads[task](net)
        adapters, _ = count_parameters(net)
        trained, total = count_parameters(model)
        # The paper's totals of Swin and ViT count the unused ImageNet-22k classifier.
        if name not in ("videomae", "resnet152"):
            total += 21841 * (net.backbone.dims[-1] + 1)
        print(
            f"{task:9} {name:9} {sizes:>10} {adapters / 1e6:8.2f} "
            f"{(trained - adapters) / 1e6:6.2f} {trained / 1e6:9.2f} {paper_trained:>6} "
            f"{total / 1e6:8.2f} {paper_total:>6}"
        )


if __name__ == "__main__":
    follow_a_clip()
    count_the_papers()
