# SPDX-License-Identifier: MIT
"""LAVISH: Latent Audio-Visual Hybrid adapters, in one file to read beside the paper.

"Vision Transformers are Parameter-Efficient Audio-Visual Learners", Lin, Sung, Lei, Bansal,
Bertasius, CVPR 2023, https://arxiv.org/abs/2212.07983

A frozen image transformer runs on video frames and, with the very same weights, on audio
spectrograms shown to it as images. Beside every attention and every MLP stands a small trainable
adapter per stream, through which each stream reads a summary of the other one:

    Y_v = X_v + MSA(X_v) + LAV(X_v <- X_a)      Z_v = Y_v + MLP(Y_v) + LAV(Y_v <- Y_a)
    Y_a = X_a + MSA(X_a) + LAV(X_a <- X_v)      Z_a = Y_a + MLP(Y_a) + LAV(Y_a <- Y_v)

Glossary
    code           paper     shape           meaning
    B, T                                     clips in a batch; seconds (frames) of a clip
    N, d                                     tokens of one image; their width at this stage
    frames         I         (B,T,3,S,S)     one video frame per second, S x S pixels
    spectrograms   A         (B,T,S,S)       one log-mel image per second: rows time, columns mel
    x, other       X_v, X_a  (B*T,N,d)       tokens of the stream to update; of the other stream
    latents        L         (m,d)           m learned latent tokens of one adapter
    summary        S         (B*T,m,d)       what the latents read from the other stream, eq. 7
    gate_av, gate  g_av, g   (1,)            learned scalars, 0 at the start
    reduction      r                         bottleneck: d -> d/r -> d
    groups         g                         groups of the bottleneck's 1x1 convolutions
    visual, audio                            per stage, the tokens of the two streams

Read in the order in which data flows: fbank, SwinV2, LavishAdapter, Lavish, then the task you want:
AVE, AVS, AVQA or UCF101. After them come the other backbones, how weights are loaded, and the two
verbs people copy. `python lavish.py` prints the parameter counts.
"""
import functools, math, re

import torch, torch.nn as nn, torch.nn.functional as F
import torch.utils.checkpoint, torchaudio, torchvision

class InputError(ValueError):
    """Something the user can mend. One line: which file or option, what is wrong, what to do."""

def require(condition, message):
    """InputError unless the condition holds."""
    if not condition:
        raise InputError(message)

# ---------------------------------------------------------------- sound becomes an image
SAMPLE_RATE = 16000
# Mean and std of AVE's spectrograms at a 5.2 ms shift (released AVE/dataloader.py). Other data and
# other sizes want their own: `python data.py stats`.
AVE_MEAN, AVE_STD = -4.984795570373535, 3.7079780101776123

def fbank(waveform, size=192, mean=AVE_MEAN, std=AVE_STD):
    """One second of sound as a log-mel image.

    waveform: (16000,) mono at 16 kHz, in [-1, 1]
    returns:  (size, size), rows are time and columns are mel bins, about zero mean and 0.5 std"""
    if waveform.shape != (SAMPLE_RATE,):
        raise ValueError(f"fbank takes one second, ({SAMPLE_RATE},); got {tuple(waveform.shape)}")
    # `size` steps over one second: 998.4 / 192 = 5.2 ms, the supplementary's shift, and the same
    # span at other sizes. 25 ms Hann windows and the released code's Kaldi options; Kaldi removes
    # each window's mean itself.
    image = torchaudio.compliance.kaldi.fbank(
        waveform[None], sample_frequency=SAMPLE_RATE, num_mel_bins=size, frame_shift=998.4 / size,
        frame_length=25.0, window_type="hanning", htk_compat=True, use_energy=False, dither=0.0)
    # AST's convention: half a standard deviation. The last window must end within the second, so
    # that at size 192 there are 188 rows. Padded after that, the others hold the mean level, not
    # silence.
    return F.pad((image - mean) / (2 * std), (0, 0, 0, size - image.shape[0]))

# ---------------------------------------------------------------- the frozen backbone: Swin-V2
# What Lavish below needs of a backbone, so that another one can take Swin's place:
#     embed(images (B,3,S,S)) -> tokens (B,N,d)
#     stages: list of (blocks, merge), merge going from this stage's tokens to the next one's
#     branches(block): the functions f in x <- x + f(x), here attention and MLP
#     norm: the last LayerNorm; dims: token widths of the stages; image_size: S
#     names(state dict): (pattern, replacement) that turn other people's parameter names into ours
# Parameter names are torchvision's.

def stage_tokens(backbone, images, update=None):
    """forward of all backbones: images (B,3,S,S) -> list of tokens (B,N,d) at the end of each
    stage, before merging, the last after the final norm. update(x, block): what a block does."""
    x, stages = backbone.embed(images), []                                     # (B,N,d)
    for blocks, merge in backbone.stages:
        for block in blocks:
            if update:
                x = update(x, block)
            else:
                for branch in backbone.branches(block):
                    x = x + branch(x)
        stages.append(x)
        x = merge(x)
    return [*stages[:-1], backbone.norm(x)]

class WindowAttention(nn.Module):
    """Swin-V2's attention (Liu et al. 2022): cosine, within windows, log-spaced position bias.

        softmax(cos(q, k) / tau + 16 sigmoid(MLP(log-spaced offset))) v,   1 / tau <= 100

    tokens (B, side*side, dim) -> (B, side*side, dim). side: tokens in a row of the image; window,
    shift: in tokens; pretrained_window: the one the weights were trained with. The constants (16,
    100, the start of tau at 0.1, 512 hidden units) are Swin-V2's."""
    def __init__(self, dim, heads, side, window, shift, pretrained_window):
        super().__init__()
        self.heads, self.side, self.window, self.shift = heads, side, window, shift
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, False))
        # Keys have no bias: under the cosine it would not cancel, and neither Microsoft nor
        # torchvision (which stores one, then zeroes it) uses it.
        bias_mask = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(dim)
        for name, table in dict(
                bias_mask=bias_mask, mask=shift_mask(side, window, shift),
                offsets=log_offsets(window, pretrained_window), index=offset_index(window)).items():
            self.register_buffer(name, table, persistent=False)
        self._bias, self._bias_of = None, None

    def forward(self, x):
        x = to_windows(x, self.side, self.window, self.shift)                   # (B,W,n,C)
        B, W, n, C = x.shape
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias * self.bias_mask)      # (B,W,n,3C)
        # To the product, every window is `heads` heads more: fused kernels take four dimensions.
        qkv = qkv.view(B, W, n, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        (q, k), v = F.normalize(qkv[:2], dim=-1), qkv[2]                        # (B,W*heads,n,C')
        q = q * self.logit_scale.clamp(max=math.log(100)).exp().repeat(W, 1, 1).to(q.dtype)
        x = attend(q, k, v, self.bias().to(q.dtype)).unflatten(1, (W, self.heads))
        x = self.proj(x.transpose(2, 3).reshape(B, W, n, C))
        return from_windows(x, self.side, self.window, self.shift)              # (B,N,C)

    def bias(self):
        """Position bias plus shift mask, (1, W*heads, n, n): computed, with gradient, in each call
        for a backbone in training; a constant of a frozen one, kept until its parameters change."""
        if torch.is_grad_enabled() and self.cpb_mlp[0].weight.requires_grad:
            return self.compute_bias()
        now = [(p.data_ptr(), p._version) for p in self.cpb_mlp.parameters()]
        if self._bias_of != now:
            self._bias, self._bias_of = self.compute_bias().detach(), now
        return self._bias

    def compute_bias(self):
        table = 16 * torch.sigmoid(self.cpb_mlp(self.offsets))                 # ((2w-1)^2,heads)
        return (table[self.index].permute(2, 0, 1) + self.mask[:, None]).flatten(0, 1)[None]

def attend(q, k, v, bias):
    """softmax(q k^T + bias) v. On a CPU the fused product's backward pass is the slower one for
    small windows and, four times, in bf16."""
    if q.is_cpu and torch.is_grad_enabled() and (q.shape[2] < 64 or q.dtype == torch.bfloat16):
        return (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)

def to_windows(x, side, window, shift=0):
    """Tokens (B, side*side, C) -> (B, W, n, C): W windows of n = window*window tokens, row by row,
    after the image was rolled up and left by `shift`."""
    x = x.unflatten(1, (side, side))                                           # (B,H,H,C)
    x = x.roll((-shift, -shift), (1, 2)) if shift else x
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))                # (B,H/w,w,H/w,w,C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

def from_windows(x, side, window, shift=0):
    """The inverse of to_windows: (B, W, n, C) -> (B, side*side, C)."""
    x = x.unflatten(2, (window, window)).unflatten(1, (side // window, -1))    # (B,H/w,H/w,w,w,C)
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)                          # (B,H,H,C)
    return (x.roll((shift, shift), (1, 2)) if shift else x).flatten(1, 2)

def log_offsets(window, pretrained_window):
    """All offsets o within a window, ((2w-1)^2, 2), as sign(o) log2(1 + |o|) / 3. Before that o is
    scaled so that the window of pretraining spans [-8, 8]; a larger one extrapolates."""
    o = torch.arange(1 - window, window) * (8 / max(pretrained_window - 1, 1))
    o = o.sign() * (1 + o.abs()).log2() / 3
    return torch.cartesian_prod(o, o)

def offset_index(window):
    """(n, n) rows of log_offsets: the offset from token j to token i of one window."""
    p = torch.cartesian_prod(torch.arange(window), torch.arange(window))       # (n,2)
    o = p[:, None] - p[None] + window - 1
    return o[..., 0] * (2 * window - 1) + o[..., 1]

def shift_mask(side, window, shift):
    """(W, n, n): -100 between tokens that only the cyclic shift brought into one window."""
    p = torch.arange(side)
    region = (p >= side - window).int() + (p >= side - shift).int() if shift else 0 * p
    region = to_windows((3 * region[:, None] + region).view(1, -1, 1), side, window)[..., 0]
    return -100.0 * (region[0, :, :, None] != region[0, :, None])

class SwinBlock(nn.Module):
    """Residual-post-norm: x <- x + norm1(attn(x)), then x <- x + norm2(mlp(x))."""
    def __init__(self, dim, heads, side, window, shift, pretrained_window):
        super().__init__()
        self.attn = WindowAttention(dim, heads, side, window, shift, pretrained_window)
        self.mlp = torchvision.ops.MLP(dim, [4 * dim, dim], activation_layer=nn.GELU)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

class PatchMerging(torchvision.models.swin_transformer.PatchMergingV2):
    """Each 2 x 2 tokens become one of twice the width: (B, side^2, d) -> (B, side^2 / 4, 2d)."""
    def forward(self, x):
        return super().forward(x.unflatten(1, (math.isqrt(x.shape[1]), -1))).flatten(1, 2)

class SwinV2(nn.Module):
    """Swin Transformer V2 (Liu et al., CVPR 2022) for square images of one size.

    images (B,3,S,S) -> tokens of the stages, (B,(S/4)^2,d), (B,(S/8)^2,2d), ...

    A stage narrower than the window gets one window of its own width, unshifted (Microsoft's rule;
    torchvision pads instead and attends to the padding). pretrained_size: of the images that the
    weights were trained with, where it is another one, for the windows' offsets."""
    def __init__(self, embed_dim, depths, num_heads, window_size, image_size, pretrained_size=None):
        super().__init__()
        self.dims, self.image_size = [embed_dim << i for i in range(len(depths))], image_size
        features = [nn.Sequential(nn.Conv2d(3, embed_dim, 4, stride=4),
                                  torchvision.ops.Permute([0, 2, 3, 1]), nn.LayerNorm(embed_dim))]
        sides, pretrained_sides = (stage_sides(size, len(depths), window_size)
                                   for size in (image_size, pretrained_size or image_size))
        for i, (side, depth, heads) in enumerate(zip(sides, depths, num_heads)):
            dim, window = self.dims[i], min(window_size, side)
            if i:
                features.append(PatchMerging(dim // 2))
            features.append(nn.ModuleList(  # every second block shifts its windows by half
                SwinBlock(dim, heads, side, window, window // 2 if j % 2 and side > window else 0,
                          min(window_size, pretrained_sides[i])) for j in range(depth)))
        self.features, self.norm = nn.ModuleList(features), nn.LayerNorm(self.dims[-1])
        self.stages = list(zip(features[1::2], [*features[2::2], nn.Identity()]))
        # To train from scratch: Linear layers as torchvision's, and every block the identity, for
        # with norm1 and norm2 at their usual ones a Swin-V2 stays at chance.
        for name, parameter in self.features[1:].named_parameters():
            if parameter.dim() == 2:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif "norm1" in name or "norm2" in name or "bias" in name:
                nn.init.zeros_(parameter)

    forward = stage_tokens

    def embed(self, images):
        return self.features[0](images).flatten(1, 2)                          # (B,(S/4)^2,d)

    def branches(self, block):
        return lambda x: block.norm1(block.attn(x)), lambda x: block.norm2(block.mlp(x))

    def names(self, state):
        # Microsoft's and timm's, which from 0.9 on has the merging at the start of the next stage.
        late = int("layers.0.downsample.norm.weight" in state)
        return ((r"^patch_embed\.proj", "features.0.0"), (r"^patch_embed\.norm", "features.0.2"),
                (r"^layers\.(\d+)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}"),
                (r"^layers\.(\d+)\.downsample", lambda m: f"features.{2 * (int(m[1]) + late)}"))

def stage_sides(size, stages, window):
    """Token rows of each stage, [S/4, S/8, ...]; refuses sizes that no windows can tile."""
    sides = lambda size: [size // (4 << i) for i in range(stages)]
    fit = [size for size in range(16, 1025, 16) if size % (2 << stages) == 0
           and all(side <= window or side % window == 0 for side in sides(size))]
    require(size in fit, f"image size {size} does not divide into windows of {window}; do: {fit}")
    return sides(size)

# ---------------------------------------------------------------- the adapter
class LavishAdapter(nn.Module):
    """One stream's update from the other stream, through m latent tokens (Sec. 3.2).

    forward(x (B,N,dim), other (B,M,dim)) -> (B,N,dim), to be added to x. The cost is
    O(m (N + M) dim), where direct cross-attention takes O(N M dim).
    latents=0 builds the one-stream adapter (bottleneck alone), called as forward(x).
    A dim that reduction x groups does not divide is a ValueError."""
    def __init__(self, dim, latents=2, reduction=8, groups=2):
        super().__init__()
        if dim % (reduction * groups):
            raise ValueError(f"dim {dim} is no multiple of reduction {reduction} x groups {groups}")
        if latents:
            # Random, as in the paper: latents that start equal (zeros, in the released AVS and
            # AVQA code) get equal gradients for ever, and m of them act as one.
            self.latents = nn.Parameter(torch.rand(latents, dim))
            self.gate_av = nn.Parameter(torch.zeros(1))
        hidden = dim // reduction
        self.norm_in = nn.LayerNorm(dim)
        self.down = nn.Conv1d(dim, hidden, 1, groups=groups, bias=False)
        self.bn_down = nn.BatchNorm1d(hidden)
        self.up = nn.Conv1d(hidden, dim, 1, groups=groups, bias=False)
        self.bn_up = nn.BatchNorm1d(dim)
        self.norm_out = nn.LayerNorm(dim)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, other=None):
        if other is not None:
            # compress, eq. 7: S = L + softmax(L y^T) y, y the other stream. One head, no
            # projections, no 1/sqrt(d): the latents are the only queries there are.
            scores = self.latents @ other.transpose(1, 2)                  # (B,m,M)
            summary = self.latents + scores.softmax(-1) @ other            # (B,m,dim)
            # fuse: x' = x + g_av softmax(x S^T) S
            scores = x @ summary.transpose(1, 2)                           # (B,N,m)
            x = x + scores.softmax(-1) @ (self.gate_av.to(x.dtype) * summary)  # bf16 stays bf16
        # bottleneck: LN(BN(up(relu(BN(down(LN(x')))))))
        z = self.norm_in(x).flatten(0, 1)                                  # (B*N,dim)
        z = F.relu(self.bn_down(self.convolve(z, self.down)))              # (B*N,dim/r)
        z = self.bn_up(self.convolve(z, self.up)).view(x.shape)            # (B,N,dim)
        # gate: g = 0 at the start, so that the network is exactly the frozen one. It comes after
        # the norm, which would cancel it (the released AVS code has it before).
        return self.gate.to(x.dtype) * self.norm_out(z)

    @staticmethod
    def convolve(z, conv):
        """A grouped 1x1 convolution with the tokens as rows: one small matrix per group, and none
        of the transposes that nn.Conv1d would want on both sides."""
        z, weight = z.unflatten(1, (conv.groups, -1)), conv.weight.unflatten(0, (conv.groups, -1))
        return torch.einsum("ngi,goi->ngo", z, weight.squeeze(-1)).flatten(1)

# ---------------------------------------------------------------- two streams, one frozen backbone
class Lavish(nn.Module):
    """A frozen backbone with adapters beside every residual branch (Fig. 2).

    frames         (B, 3, S, S)  normalised as the backbone's pretraining images
    spectrograms   (B, S, S)     from fbank; B counts images, so fold clips and seconds together
    returns        (visual, audio), each a list over stages of tokens (B, N, d), the last one after
                   the final norm; None for a stream that is out

    modality "v" or "a" leaves one stream out altogether: not its pixels but its adapters and
    features, and the cross-modal part of the other one's adapters.
    drop_path: stochastic depth of the frozen branches in training, rising linearly over the blocks
    (released: timm's default of 0.1, stated nowhere in the paper).
    checkpoint_activations: compute each block again in the backward pass instead of keeping it."""
    def __init__(self, backbone, latents=2, reduction=8, groups=2, modality="av", drop_path=0.0,
                 checkpoint_activations=False):
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        self.backbone = backbone.requires_grad_(False)
        self.streams = {"av": ("visual", "audio"), "v": ("visual",), "a": ("audio",)}[modality]
        latents *= modality == "av"  # without the other stream there is nothing to read
        # [block][branch][stream]: with both streams and a Swin's two branches, four per block.
        self.adapters = nn.ModuleList(nn.ModuleList(nn.ModuleDict(
            {stream: LavishAdapter(dim, latents, reduction, groups) for stream in self.streams})
            for _ in backbone.branches(block))
            for (blocks, _), dim in zip(backbone.stages, backbone.dims) for block in blocks)
        # Plain numbers, on whatever device the model is built.
        self.drop_rates = torch.linspace(0, drop_path, len(self.adapters), device="cpu").tolist()
        if checkpoint_activations:  # every batch will pass a batch norm twice, and count once:
            for norm in (m for m in self.adapters.modules() if isinstance(m, nn.BatchNorm1d)):
                norm.momentum = 1 - (1 - norm.momentum) ** 0.5  # two such steps are one as before

    def train(self, mode=True):
        super().train(mode).backbone.eval()  # frozen means its statistics too
        return self

    def forward(self, frames, spectrograms):
        images = {"visual": frames, "audio": spectrograms[:, None].expand(-1, 3, -1, -1)}
        per_block, run = iter(zip(self.adapters, self.drop_rates)), self.update
        if self.checkpoint_activations and self.training:
            run = functools.partial(torch.utils.checkpoint.checkpoint, run, use_reentrant=False)
        # The weights are shared, so that both streams run in ONE pass, along the batch: (2B,N,d).
        stages = self.backbone(torch.cat([images[s] for s in self.streams]),
                               lambda x, block: run(x, block, *next(per_block)))
        tokens = dict(zip(self.streams, zip(*(stage.chunk(len(self.streams)) for stage in stages))))
        return tokens.get("visual"), tokens.get("audio")

    def update(self, x, block, adapters, drop):
        """Y = X + MSA(X) + LAV(X), then Z = Y + MLP(Y) + LAV(Y), for both streams X."""
        for branch, lav in zip(self.backbone.branches(block), adapters):
            frozen = torchvision.ops.stochastic_depth(branch(x), drop, "row", self.training)
            if len(self.streams) == 1:
                x = x + frozen + lav[self.streams[0]](x)
            else:  # LAV(X_v <- X_a) and LAV(X_a <- X_v), both from what neither has changed yet
                v, a = x.chunk(2)                                              # (B,N,d) each
                x = x + frozen + torch.cat([lav["visual"](v, a), lav["audio"](a, v)])
        return x

    def pooled(self, frames, spectrograms):
        """(B,T,3,S,S), (B,T,S,S) -> (B,T,d or 2d): what stands for each image, a ViT's class token
        or the mean over the tokens, of both streams side by side."""
        streams = self(frames.flatten(0, 1), spectrograms.flatten(0, 1))
        chosen = slice(0, 1 if hasattr(self.backbone, "class_token") else None)
        pooled = [tokens[-1][:, chosen].mean(1) for tokens in streams if tokens]
        return torch.cat(pooled, -1).unflatten(0, (len(frames), -1))

# ---------------------------------------------------------------- the tasks' heads
# Logits are float32 under autocast too, for the losses.

class AVE(nn.Module):
    """Audio-visual event localisation: which event is seen and heard in each second (Sec. 4.1).

    frames (B,T,3,S,S), spectrograms (B,T,S,S) -> logits (B,T,classes), the last class background
    extra: width of more features (B,T,extra), as VGGish's 128 (Table 3 of the supplementary)"""
    def __init__(self, net, classes=29, hidden=512, extra=0):
        super().__init__()
        self.net, width = net, len(net.streams) * net.backbone.dims[-1] + extra
        # Two linear layers with nothing between them, as released.
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.Linear(hidden, classes))

    def forward(self, frames, spectrograms, *extra):
        pooled = self.net.pooled(frames, spectrograms)                         # (B,T,2d)
        return self.head(torch.cat([pooled, *extra], -1)).float()

def to_maps(tokens):  # (B,H*H,d) -> (B,d,H,H)
    return tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))

class TPAVI(nn.Module):
    """Temporal pixel-wise audio-visual interaction (AVSBench, ECCV 2022): every pixel of a clip
    reads all others, weighted by how its theta agrees with the sound phi of their frame.

    x (B*T,C,H,W), audio (B,T,audio_dim) -> z (B*T,C,H,W); for pixel p of frame t, over T frames of
    P = H W pixels,

        y_tp = 1/(TP) sum_t'p' (theta_tp . phi_t') g_t'p'            z = LN(x + BN(W y))

    As published, this forms the TP x TP weights (983 MB at 5 frames of 56 x 56). But no softmax
    stands between the two products and phi is one per frame, so the sums may change places:

        y_tp = theta_tp [1/T sum_t' phi_t'^T gbar_t'],    gbar_t = mean_p g(x_tp) = g(mean_p x_tp)
    """
    def __init__(self, channels, audio_dim=128):
        super().__init__()
        self.align = nn.Linear(audio_dim, channels)
        self.theta, self.phi, self.g = (nn.Linear(channels, channels // 2) for _ in range(3))
        self.out, self.bn = nn.Linear(channels // 2, channels), nn.BatchNorm1d(channels)
        self.norm = nn.LayerNorm(channels)
        nn.init.zeros_(self.bn.weight)  # at the start the sound has no say: z = LN(x)

    def forward(self, x, audio):
        B, T, _ = audio.shape
        x = x.movedim(1, -1)                                               # (B*T,H,W,C)
        phi = self.phi(self.align(audio))                                  # (B,T,C/2)
        gbar = self.g(x.mean((1, 2))).view(B, T, -1)                       # (B,T,C/2)
        theta = self.theta(x).reshape(B, -1, gbar.shape[-1])               # (B,T*H*W,C/2)
        y = self.out(theta @ (phi.transpose(1, 2) @ gbar / T))             # (B,T*H*W,C)
        return self.norm(x + self.bn(y.flatten(0, 1)).view(x.shape)).movedim(-1, 1)

class ResidualUnit(nn.Module):
    """relu(x) + conv(relu(conv(relu(x)))): the shortcut is rectified too, because the released
    code's first relu works in place."""
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        x = F.relu(x)
        return x + self.conv2(F.relu(self.conv1(x)))

class AVS(nn.Module):
    """Audio-visual segmentation: a mask of what sounds, by AVSBench's decoder (Sec. 4.1).

    frames (B,T,3,S,S), spectrograms (B,T,S,S) -> mask logits (B,T,mask_size,mask_size); T is 1
    with first=True, all that the loss of S4 looks at. Without sound there is no TPAVI; without
    frames, or with a backbone of one stage, an InputError. Widths, dilations, the start of the
    convolutions and 128 channels of sound (VGGish's, once) are those of AVSBench's PVT decoder."""
    def __init__(self, net, mask_size=224, channels=256, widths=(64, 128, 320, 512),
                 mask_widths=(128, 32), audio_dim=128):
        super().__init__()
        self.net, dims = net, net.backbone.dims
        require("visual" in net.streams and len(dims) > 1,
                "segmentation needs frames, and a Swin-V2 or a ResNet for its maps")
        n, audible = len(dims), "audio" in net.streams
        # Map i has side sizes[i + 1], mask_size / 4, / 8 ...; once fused it grows to sizes[i].
        self.sizes = [max(1, mask_size // 2 ** (i + 1)) for i in range(n + 1)]
        self.project = nn.ModuleList(nn.Linear(d, w) for d, w in zip(dims, widths))
        self.dilated = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(w, channels, 3, padding=r, dilation=r) for r in (3, 6, 12, 18))
            for w in widths[:n])
        for weight in (p for p in self.dilated.parameters() if p.dim() == 4):
            nn.init.normal_(weight, std=0.01)
        self.audio = nn.Linear(dims[-1], audio_dim) if audible else None
        self.tpavi = nn.ModuleList(TPAVI(channels, audio_dim) for _ in range(n if audible else 0))
        # The coarsest map is added to nothing; the released unit for it (1.18M) is never used.
        self.skip = nn.ModuleList([*(ResidualUnit(channels) for _ in range(n - 1)), nn.Identity()])
        self.fuse = nn.ModuleList(ResidualUnit(channels) for _ in range(n))
        self.mask = nn.Sequential(
            nn.Conv2d(channels, mask_widths[0], 3, padding=1),
            nn.Upsample((mask_size, mask_size), mode="bilinear"),
            nn.Conv2d(*mask_widths, 3, padding=1), nn.ReLU(), nn.Conv2d(mask_widths[1], 1, 1))

    def forward(self, frames, spectrograms, first=False):
        B, T = frames.shape[:2]
        visual, audio = self.net(frames.flatten(0, 1), spectrograms.flatten(0, 1))
        maps = [F.interpolate(to_maps(project(tokens)), size, mode="bicubic")  # (B*T,w,size,size)
                for tokens, project, size in zip(visual, self.project, self.sizes[1:])]
        if audio:
            audio = self.audio(audio[-1].mean(1)).view(B, T, -1)               # (B,T,128)
        return self.decode(maps, audio, T if first else 1).view(B, -1, *self.mask[1].size).float()

    def decode(self, maps, audio=None, step=1):
        """maps [(B*T,w,size,size)], audio (B,T,128) -> logits of every step-th frame."""
        maps = [sum(conv(x) for conv in convs) for x, convs in zip(maps, self.dilated)]
        if audio is not None:
            maps = [tpavi(x, audio) for x, tpavi in zip(maps, self.tpavi)]     # (B*T,C,size,size)
        x = 0
        for i in reversed(range(len(maps))):                                   # coarse to fine
            x = F.interpolate(self.fuse[i](x + self.skip[i](maps[i][::step])), self.sizes[i],
                              mode="bilinear", align_corners=True)
        return self.mask(x)                                                    # (B*T,1,mask,mask)

class TemporalGrounding(nn.Module):
    """When? The question (B,D) attends to the seconds (B,T,D) of one stream -> (B,D). Heads and
    dropout are MUSIC-AVQA's."""
    def __init__(self, hidden, heads=4, dropout=0.1):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden, heads, dropout, batch_first=True)
        self.mlp = torchvision.ops.MLP(hidden, [hidden, hidden], dropout=dropout)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, question, seconds):
        z = self.attention(question[:, None], seconds, seconds, need_weights=False)[0][:, 0]
        # LN(z + MLP(z)) + mean_t s_t: the mean keeps what every second says, asked for or not.
        return self.norm(z + self.mlp(z)) + seconds.mean(1)

class AVQA(nn.Module):
    """Audio-visual question answering, with the head of MUSIC-AVQA (Li et al., CVPR 2022).

    frames (B,T,3,S,S), spectrograms (B,T,S,S), question (B,W) word indices,
    foreign (B,T,3,S,S) frames of other videos, in training only
    -> answer logits (B,answers), match: logits (2*B*T,2), real frames first, class 1 "this frame
    goes with this sound"; None without foreign frames or with one stream out."""
    def __init__(self, net, words=93, answers=42, hidden=512):
        super().__init__()
        self.net, dim, joint = net, net.backbone.dims[-1], len(net.streams) * hidden
        self.words = nn.Embedding(words, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.question = nn.Linear(2 * hidden, hidden)
        if "audio" in net.streams:
            self.audio_in, self.audio_out = nn.Linear(dim, hidden), nn.Linear(hidden, hidden)
            self.when_heard = TemporalGrounding(hidden)
        if "visual" in net.streams:
            self.visual_in, self.visual_out = nn.Linear(dim, hidden), nn.Linear(joint, hidden)
            self.when_seen = TemporalGrounding(hidden)
        if len(net.streams) == 2:
            self.match = torchvision.ops.MLP(joint, [hidden, hidden // 2, hidden // 4, 2])
        self.fusion, self.answer = nn.Linear(joint, hidden), nn.Linear(hidden, answers)

    def forward(self, frames, spectrograms, question, foreign=None):
        visual, audio = self.net(frames.flatten(0, 1), spectrograms.flatten(0, 1))
        if foreign is not None and len(self.net.streams) == 2:
            with torch.no_grad():  # as released: through the frozen backbone, without adapters
                foreign = self.net.backbone(foreign.flatten(0, 1))[-1]         # (B*T,N,d)
        return self.reason(visual and visual[-1], audio and audio[-1], question, foreign)

    def reason(self, visual, audio, question, foreign=None):
        """Last-stage tokens (B*T,N,d) of the streams and of foreign frames -> as forward."""
        B, heard, found, match = len(question), None, [], None  # heard, seen: one vector a second
        # As released, the LSTM reads the padding too: W must be one number for all questions.
        _, (h, c) = self.lstm(self.words(question).tanh())                     # (1,B,D) each
        question = self.question(torch.cat([h[0], c[0]], -1).tanh())           # (B,D)
        if audio is not None:
            heard = self.audio_out(self.audio_in(audio.mean(1)).relu())        # (B*T,D)
            found.append(self.when_heard(question, heard.unflatten(0, (B, -1))))
        if visual is not None:
            seen = self.ground(visual, heard)                                  # (B*T,D)
            found.append(self.when_seen(question, seen.unflatten(0, (B, -1))))
        fused = self.fusion(torch.cat(found, -1).tanh())                       # (B,D)
        if foreign is not None and len(found) == 2:
            frames = torch.cat([seen, self.ground(foreign, heard)])            # (2*B*T,D)
            match = self.match(torch.cat([heard.repeat(2, 1), frames], -1)).float()
        return self.answer((question * fused).tanh()).float(), match

    def ground(self, visual, heard):
        """Where? sum_n softmax_n(cos(a, v_n)) v_n / |v_n|, beside the plain mean -> (B*T,D)."""
        tokens = self.visual_in(visual)                                        # (B*T,N,D)
        views = [tokens.mean(1)]
        if heard is not None:
            unit = F.normalize(tokens, dim=-1)
            cosine = unit @ F.normalize(heard, dim=-1)[..., None]              # (B*T,N,1)
            views.append((cosine.softmax(1) * unit).sum(1))
        return self.visual_out(torch.cat(views, -1).tanh())

class UCF101(nn.Module):
    """Action recognition (Table 2 of the supplementary): what is done in a clip.

    frames (B,16,3,S,S), spectrograms (B,8,S,S), one per tubelet -> logits (B,classes)"""
    def __init__(self, net, classes=101):
        super().__init__()
        self.net, self.head = net, nn.Linear(len(net.streams) * net.backbone.dims[-1], classes)

    def forward(self, frames, spectrograms):
        # VideoMAE has one vector for a clip; a backbone of images 16, to be averaged.
        pooled = self.net.pooled(frames, spectrograms.repeat_interleave(2, 1)).mean(1)  # (B,2d)
        return self.head(pooled).float()

# ---------------------------------------------------------------- the supplementary's backbones
class ViT(torchvision.models.VisionTransformer):
    """Vision Transformer (Dosovitskiy et al., ICLR 2021): one stage, class token first. Pre-norm:
    x <- x + attn(norm1(x)), then x <- x + mlp(norm2(x)). Patches of 16 x 16 pixels."""
    forward, norm = stage_tokens, property(lambda self: self.encoder.ln)

    def __init__(self, layers, heads, dim, image_size):
        require(image_size % 16 == 0, f"image size {image_size} is no multiple of 16")
        super().__init__(image_size, 16, layers, heads, dim, 4 * dim)
        self.dims, self.heads = [dim], nn.Identity()
        self.stages = [(self.encoder.layers, nn.Identity())]

    def embed(self, images):
        tokens = [self.class_token.expand(len(images), -1, -1), self._process_input(images)]
        return torch.cat(tokens, 1) + self.encoder.pos_embedding               # (B,1+(S/16)^2,d)

    def branches(self, block):
        return (lambda x: block.self_attention(*3 * [block.ln_1(x)], need_weights=False)[0],
                lambda x: block.mlp(block.ln_2(x)))
    names = lambda self, state: (  # timm's and VideoMAE's (whose fc_norm comes after the mean)
        (r"^encoder\.(?=patch_embed|blocks|norm)", ""), ("^patch_embed.proj", "conv_proj"),
        ("^cls_token", "class_token"), ("^pos_embed$", "encoder.pos_embedding"),
        (r"^blocks\.", "encoder.layers.encoder_layer_"), (r"\.norm([12])", r".ln_\1"),
        (r"^(fc_)?norm\.", "encoder.ln."), (r"attn\.qkv\.", "self_attention.in_proj_"),
        (r"attn\.proj", "self_attention.out_proj"))

class VideoMAE(ViT):
    """VideoMAE's encoder (Tong et al., NeurIPS 2022): one token per tubelet, 2 frames of 16 x 16
    pixels; fixed sine positions, no class token. 16 images in a row are taken as one clip; a
    spectrogram comes as a still of two frames, so that it is a tubelet in each place."""
    def __init__(self, layers, heads, dim, image_size):
        super().__init__(layers, heads, dim, image_size)
        del self.class_token, self.encoder.pos_embedding
        self.conv_proj = nn.Conv3d(3, dim, (2, 16, 16), (2, 16, 16))
        place = torch.arange(8 * (image_size // 16) ** 2)[:, None]
        angle = place / 10000 ** (torch.arange(0, dim, 2) / dim)               # (N,d/2)
        positions = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)     # sin, cos, sin, ...
        self.register_buffer("positions", positions, persistent=False)

    def embed(self, images):
        x = self.conv_proj(images.unflatten(0, (-1, 16)).transpose(1, 2))      # (B,d,8,S/16,S/16)
        return x.flatten(2).transpose(1, 2) + self.positions                   # (B,8*(S/16)^2,d)

class ResNet(torchvision.models.ResNet):
    """Residual network (He et al., CVPR 2016). A block that changes the shape only merges; any
    other, relu(x + f(x)), is one branch: x <- x + (relu(x + f(x)) - x)."""
    forward, names = stage_tokens, lambda self, state: ()

    def __init__(self, depths, image_size):
        super().__init__(torchvision.models.resnet.Bottleneck, depths)
        self.dims, self.image_size = [256, 512, 1024, 2048], image_size
        self.fc = self.norm = nn.Identity()
        layers = self.layer1, self.layer2, self.layer3, self.layer4
        merges = [functools.partial(on_maps, layer[0]) for layer in layers[1:]]
        self.stages = [(layer[1:], merge) for layer, merge in zip(layers, [*merges, self.norm])]

    def embed(self, images):
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))              # (B,64,S/4,S/4)
        return self.layer1[0](x).flatten(2).transpose(1, 2)                    # (B,(S/4)^2,256)

    def branches(self, block):
        return [lambda x: on_maps(block, x) - x]

def on_maps(module, tokens):  # (B,H*H,d) -> (B,H'*H',d')
    return module(to_maps(tokens)).flatten(2).transpose(1, 2)

# ---------------------------------------------------------------- backbones and weights by name
BACKBONES = {  # name: (class, its settings, image size and name of the published weights)
    "nano": (SwinV2, (32, (2, 2, 2), (2, 4, 8), 6), 48, None),  # the toy's
    "tiny": (SwinV2, (96, (2, 2, 6, 2), (3, 6, 12, 24), 8), 256, "swin_v2_t"),  # torchvision's
    "small": (SwinV2, (96, (2, 2, 18, 2), (3, 6, 12, 24), 8), 256, "swin_v2_s"),
    "base": (SwinV2, (128, (2, 2, 18, 2), (4, 8, 16, 32), 8), 256, "swin_v2_b"),
    "base12": (SwinV2, (128, (2, 2, 18, 2), (4, 8, 16, 32), 12), 192, "base"),  # Microsoft's
    "large": (SwinV2, (192, (2, 2, 18, 2), (6, 12, 24, 48), 12), 192, "large"),  # the paper's
    "vit_tiny": (ViT, (12, 3, 192), 224, None), "vit_small": (ViT, (12, 6, 384), 224, None),
    "vit_base": (ViT, (12, 12, 768), 224, "vit_b_16"),
    "vit_large": (ViT, (24, 16, 1024), 224, "vit_l_16"),
    "videomae": (VideoMAE, (12, 12, 768), 224, None),
    "videomae_nano": (VideoMAE, (4, 4, 64), 48, None),  # the toy's
    "resnet152": (ResNet, ((3, 8, 36, 3),), 224, "resnet152")}

def make_backbone(name, image_size=None):
    """A backbone with random weights, by name (a key of BACKBONES), for images of the size it was
    published for unless told."""
    require(name in BACKBONES, f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}")
    kind, settings, native, _ = BACKBONES[name]
    return kind(*settings, image_size or native, *[native] * (kind is SwinV2))

def load_pretrained(backbone, state_dict):
    """Load weights under their publisher's names; what does not fit is an InputError."""
    state = state_dict.get("model", state_dict.get("module", state_dict))
    # Neither classifier nor decoder is used, and the tables follow from the window.
    unused = "^head|^fc[.]|^decoder|^mask_token|^encoder_to|relative_(position|coords)|attn_mask"
    state = {key: tensor for key, tensor in state.items() if not re.search(unused, key)}
    for key in [key for key in state if key.endswith("q_bias")]:  # keys have none
        q, v = state.pop(key), state.pop(key.replace("q_bias", "v_bias"))
        state[key.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    mlps = (r"mlp\.(fc|linear_)1", "mlp.0"), (r"mlp\.(fc|linear_)2", "mlp.3")  # of all publishers
    for old, new in (*backbone.names(state), *mlps):
        state = {re.sub(old, new, key): tensor for key, tensor in state.items()}
    load_checked(backbone, backbone.state_dict(), state, "the weights do not fit this backbone")

def load_checked(model, wanted, found, what):
    """Load the state dict `found`. Its keys and shapes are to be those of `wanted`, a part or all
    of the model's own; an InputError names what is missing, extra or misshaped."""
    wanted, shapes = ({k: tuple(t.shape) for k, t in d.items()} for d in (wanted, found))
    faults = [f"{k} is {shapes.get(k, 'missing')}, not {wanted.get(k, 'wanted')}"
              for k in {**wanted, **shapes} if wanted.get(k) != shapes.get(k)]
    require(not faults, f"{what}: {'; '.join(faults[:8] + ['...'] * (len(faults) > 8))}")
    model.load_state_dict(found, strict=False)

# ---------------------------------------------------------------- two verbs to copy
def freeze_all_but_adapters(model):
    """Leave only the LavishAdapters of a model trainable (then unfreeze the head by hand)."""
    model.requires_grad_(False)
    for adapter in (m for m in model.modules() if isinstance(m, LavishAdapter)):
        adapter.requires_grad_(True)

def trained_state_dict(model):
    """What training changed, and no more: 40 MB beside a Swin-V2-L of 900. A module that owns a
    trainable parameter is kept with its buffers (batch-norm statistics)."""
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    return {k: t for k, t in model.state_dict().items() if k.rpartition(".")[0] in trained}

def load_trained_state_dict(model, state_dict, what="the checkpoint is of another configuration"):
    """The inverse of trained_state_dict; a key that does not fit is an InputError naming it."""
    load_checked(model, trained_state_dict(model), state_dict, what)

def count_parameters(model):
    """(trainable, total)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters())

def main():
    """Print the parameters of the paper's configurations, in millions, beside the paper's."""
    print("head   backbone   m/r/g adapters     head trainable  paper     total  paper")
    for head, name, m, r, g, *paper in (
            (AVE, "large", 2, 8, 2, 10.1, 238.8), (AVE, "base12", 2, 8, 2, 5.0, 114.2),
            (AVE, "vit_base", 2, 8, 2, 4.7, 107.2), (AVE, "vit_large", 2, 8, 2, 14.5, 340.1),
            (AVS, "large", 16, 4, 2, 37.2, 266.4), (AVQA, "large", 16, 4, 2, 21.1, 249.8),
            (AVQA, "large", 64, 8, 4, 21.1, 249.8), (UCF101, "videomae", 2, 4, 2, 7.4, "-")):
        with torch.device("meta"):  # shapes without memory
            model = head(Lavish(make_backbone(name), m, r, g))
        adapters, (trained, total) = count_parameters(model.net)[0], count_parameters(model)
        # The paper's totals count the unused ImageNet-22k classifier; UCF101's backbone has none.
        total += (head is not UCF101) * 21841 * (model.net.backbone.dims[-1] + 1)
        here = [n / 1e6 for n in (adapters, trained - adapters, trained, total)]
        print("{:6} {:9} {:2}/{}/{}{:9.2f}{:9.2f}{:10.2f}{:7}{:10.2f}{:>7}".format(
            head.__name__, name, m, r, g, *here[:3], paper[0], here[3], paper[1]))

if __name__ == "__main__":
    main()
