# SPDX-License-Identifier: MIT
"""Data: sound and frames from disk, a Dataset for each data set, and toys of the
same layouts.

    python data.py extract VIDEOS ROOT          videos -> frames and sounds
    python data.py check TASK ROOT [--size S]   read all items, print the faults
    python data.py stats TASK ROOT [--size S]   mean and std of the spectrograms
    python data.py toy TASK ROOT                write the toy data set

TASK is ave, avs, avqa or ucf101; S is the side of the images in pixels, 192
unless given. All that is written lies in ROOT.

From top to bottom: sound and frames, the four Datasets, the commands, whole
files, the toys. Shapes: T = seconds (or frames) of a clip, S = image side, N =
samples of a sound. "The release" is github.com/GenjiB/LAVISH at commit 97722b0;
its files are named with their lines.
"""

import argparse
import csv
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import wave
from collections import Counter, defaultdict
from fractions import Fraction
from os.path import abspath, dirname, exists
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchaudio
from PIL import Image, ImageOps
from torch.nn.functional import pad
from torch.utils.data import Dataset
from torchvision.transforms import functional
from tqdm import tqdm

from lavish import AVE_MEAN, AVE_STD, SAMPLE_RATE, InputError, fbank, require

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ---------------------------------------------------------------- sound
# A sound is one tensor (N,) of samples. What is fed to a net is one spectrogram for each second, so
# sound is first cut into seconds (T, 16000), then each second becomes an image (T, S, S).


def read_wav(path):
    """A 16-bit PCM wav of any rate and channel count -> (N,) float32, mono, 16 kHz, in [-1, 1].

    The mean is removed, as in the release (AVE/dataloader.py:132). The release then uses the left
    channel alone, because Kaldi's fbank takes the first row (AVE/dataloader.py:171). Here the
    channels are averaged, so that a sound on the right is heard too.
    """
    require(exists(path), f"no sound at {path}; data.py check reads every item")
    convert = "convert it: ffmpeg -i IN -ac 1 -ar 16000 -c:a pcm_s16le OUT.wav"
    try:
        raw = Path(path).read_bytes()
        # The "extensible" header says with other numbers that this is PCM. Before Python 3.12 wave
        # knows the plain header alone, whose number for PCM is 1.
        raw = re.sub(rb"(?s)(?<=fmt ....)\xfe\xff", b"\1\0", raw)
        with wave.open(io.BytesIO(raw)) as file:
            channels, width, rate, *_ = file.getparams()
            # As many samples as a file of this size may hold: the header may claim more.
            content = file.readframes(len(raw))
    except (wave.Error, EOFError, OSError) as error:
        raise InputError(f"{path} is no wav that Python can read ({error!r}); {convert}") from None
    require(
        width == 2 and 1000 <= rate <= 400000 and len(content) >= 2 * channels,
        f"{path} has {8 * width} bit at {rate} Hz, {len(content)} bytes of samples; {convert}",
    )

    whole = len(content) // (2 * channels) * channels  # a cut file may end within a sample
    samples = np.frombuffer(content, "<i2", whole).reshape(-1, channels)  # (samples, channels)
    sound = torch.from_numpy(samples.mean(1) / 32768).float()  # (N,)
    # The ratio to 16 kHz must be simple: 44,100 Hz gives 160 / 441, but 16000 / 44099 would need a
    # filter of 12 GB. All usual rates are multiples of 25 Hz, so the rate is rounded to one.
    rate = 25 * round(rate / 25)
    sound = torchaudio.functional.resample(sound, rate, SAMPLE_RATE)
    return sound - sound.mean()


def seconds_of(sound, count):
    """(N,) -> (count, 16000): second t is samples 16000 t to 16000 (t+1), silence after the end.

    The release's last window begins 1.1 s before the end (AVE/dataloader.py:162), which is 0.1 s
    before the second of its label in a clip of ten seconds.
    """
    sound = pad(sound, (0, count * SAMPLE_RATE - len(sound)))  # a negative padding cuts
    return sound.view(count, SAMPLE_RATE)


def spectrograms_of(seconds, size, stats):
    """Seconds of sound (T, 16000) -> their log-mel images (T, S, S). stats is (mean, std)."""
    return torch.stack([fbank(second, size, *stats) for second in seconds])


# ---------------------------------------------------------------- frames


def open_image(path):
    """A jpg or png of 8 bits per channel -> an RGBA image of Pillow's, turned as its EXIF says."""
    try:
        image = Image.open(path, formats=["JPEG", "PNG"])
        image = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception as error:  # Pillow documents no list of what it raises here
        raise InputError(f"{path} is no readable jpg or png ({error}); make it again") from None
    # Pillow would keep only the upper 8 of 16 bits, or clip greys at 255. Byte 24 of a png is its
    # number of bits.
    with open(path, "rb") as file:
        header = file.read(25)
    deep = header.startswith(b"\x89PNG") and header[24] == 16
    require(not deep, f"{path} has not 8 bits per channel; convert it to 8")
    return image


def read_image(path):
    """A jpg or png of 8 bits per channel -> (3, height, width) uint8, as viewers show it.

    Transparent pixels become white.
    """
    image = open_image(path)
    page = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(page, image)
    return functional.pil_to_tensor(image.convert("RGB"))


def read_frames(paths, size):
    """T paths -> (T, 3, S, S) float32 with ImageNet's normalisation. The aspect ratio is not kept.

    Bicubic as in the release (AVE/dataloader.py:99), whose torchvision had no antialiasing: a large
    frame became a sample of single pixels. Here it is antialiased. Bicubic can overshoot the range
    of the pixels, so the result is clamped.
    """
    bicubic = functional.InterpolationMode.BICUBIC
    frames = []
    for path in paths:
        image = read_image(path) / 255  # (3, height, width)
        image = functional.resize(image, [size, size], bicubic, antialias=True)  # (3, S, S)
        frames.append(image.clamp(0, 1))
    return functional.normalize(torch.stack(frames), IMAGENET_MEAN, IMAGENET_STD)


# ---------------------------------------------------------------- where files are
# Three of the data sets keep a video as a folder of frames and one wav, in the layout of `extract`:
# ROOT/video_frames/ID/0001.jpg, 0002.jpg, ... and ROOT/raw_audio/ID.wav. AVSBench has its own.


def video_paths(root, video):
    """The folder of the frames of a video, and the path of its sound."""
    return f"{root}/video_frames/{video}", f"{root}/raw_audio/{video}.wav"


def video_files(root, video):
    """The frames of a video, a list of paths, and its sound, one path.

    The frames are in the order of their numbers, whatever the padding with zeros. InputError for a
    folder without any.
    """
    folder, wav = video_paths(root, video)
    frames = [path for path in Path(folder).glob("*.jpg") if path.stem.isdecimal()]
    frames.sort(key=lambda path: int(path.stem))  # 9.jpg comes before 10.jpg
    require(frames, f"no frames 0001.jpg, 0002.jpg ... in {folder}; data.py check reads every item")
    return [str(path) for path in frames], wav


def by_second(paths, sound):
    """The frame from the middle of each second: a list of the paths that are needed.

    The length of the sound tells how many frames there are in a second, a whole number. The release
    stretches the frames over the ten seconds of the labels (AVE/dataloader.py:223), which shifts
    them if there are 9 or 11. InputError if the frames do not fit the sound.
    """
    duration = len(sound) / SAMPLE_RATE  # in seconds
    fps = max(1, round(len(paths) / max(1, duration)))  # frames a second
    # A difference of half a second, and of one frame by rounding, moves no frame to another second.
    require(
        abs(len(paths) / fps - duration) < 0.5 + 1 / fps,
        f"{dirname(paths[0])} has {len(paths)} frames, but its sound has {duration:.1f} s: "
        "which frame is of which second? Extract both from the video again",
    )
    return paths[fps // 2 :: fps]


def read_lines(path):
    """The lines of a text file, stripped, without the empty ones. There must be at least one."""
    require(exists(path), f"no {path}; wrong folder, or a run that is not done? See the README")
    try:
        with open(path, encoding="utf-8") as file:
            # Editors on Windows put a byte-order mark in front, which is no part of a line.
            lines = [line.replace("\ufeff", "").strip() for line in file]
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it again as UTF-8") from None
    lines = [line for line in lines if line]
    require(lines, f"{path} is empty; the README says what it should hold")
    return lines


def read_json(path):
    """What a file of JSON holds."""
    text = "\n".join(read_lines(path))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); fetch or make it again") from None


def missing_files(dataset):
    """The paths that the items of a dataset need and that do not exist."""
    missing = []
    for i in distinct_items(dataset):
        # Lists of frames, with AVSBench of masks too, and the sound.
        *images, wav = dataset.files(i)
        for paths in ([wav], *images):
            missing += [path for path in paths if path and not exists(path)]
    return missing


# ---------------------------------------------------------------- statistics of the spectrograms
# A spectrogram is normalised as (x - mean) / (2 std), see lavish.fbank. The two numbers depend on
# the data and on the size of the image, which sets the width of a step in time and of a mel bin.


def stats_path(root, size):
    """Where the statistics for images of `size` pixels are kept, as [mean, std]."""
    return f"{root}/fbank{size}.json"


def find_stats(root, task, size, classes=()):
    """The [mean, std] to use. One printed line if they are those of other data or another size.

    AVE's released statistics hold for AVE at 192 pixels (AVE/dataloader.py:84-85). Other data and
    other sizes have other ones: their spectrograms then have neither zero mean nor the same spread.
    AVE is known by its classes.
    """
    path = stats_path(root, size)
    if exists(path):
        try:
            mean, std = map(float, read_json(path))
            require(abs(mean) < 100 and 0 < std < 100, "out of range")  # NaN fails too
        except (ValueError, TypeError):
            raise InputError(f"{path} is not [mean, std]; remove it, run data.py stats") from None
        return [mean, std]
    if size != 192 or "; ".join(classes) != AVE_CLASSES:
        print(
            f"{root}: no statistics for spectrograms of size {size}, so AVE's of size 192 are used;"
            f" to measure its own: python data.py stats {task} {shlex.quote(root)} --size {size}"
        )
    return [AVE_MEAN, AVE_STD]


# ---------------------------------------------------------------- AVE
# Each Dataset below has the same lists and methods. For item i, videos[i] says which video it is
# of; about[i] its class, and how many of its seconds are of that class; files(i) all files that it
# needs: frames, with AVSBench masks, and the sound; paths_and_sound(i) the frames that are read,
# and the sound beside them, (T, 16000). __init__ raises InputError for a wrong list, __getitem__
# for a damaged frame or sound.

# In the order of the real Annotations.txt.
AVE_CLASSES = (
    "Church bell; Male speech, man speaking; Bark; Fixed-wing aircraft, airplane; "
    "Race car, auto racing; Female speech, woman speaking; Helicopter; Violin, fiddle; Flute; "
    "Ukulele; Frying (food); Truck; Shofar; Motorcycle; Acoustic guitar; Train horn; Clock; Banjo; "
    "Goat; Baby cry, infant cry; Bus; Chainsaw; Cat; Horse; Toilet flush; Rodents, rats, mice; "
    "Accordion; Mandolin"
)


class AVEDataset(Dataset):
    """Audio-visual events (Tian et al., ECCV 2018): ten seconds, each with one event or background.

        root/Annotations.txt                       Category&VideoID&Quality&StartTime&EndTime
        root/trainSet.txt valSet.txt testSet.txt   the same lines, split
        root/video_frames/ID/*.jpg                 at any rate
        root/raw_audio/ID.wav

    item: frames (10, 3, S, S), spectrograms (10, S, S), with extra_audio features (10, 128),
          labels (10,) int64

    Categories are numbered in the order in which Annotations.txt names them; background comes last
    (28 in the real data). One real row has start = end = 0: all of it is background.
    extra_audio is an .npy of shape (rows of Annotations.txt, 10, 128).
    """

    def __init__(self, root, split, size, stats=None, extra_audio=""):
        self.root = root
        self.size = size

        rows = read_lines(f"{root}/Annotations.txt")
        if rows[0].startswith("Category&"):  # the zip's copy has a header, all others have none
            rows.pop(0)
        self.classes = list(dict.fromkeys(row.split("&")[0] for row in rows))

        path = f"{root}/{split}Set.txt"
        lines = read_lines(path)
        self.clips = []  # (label, start, end)
        self.videos = []
        self.about = []
        for line in lines:
            match = re.fullmatch(r"(.+)&(.+)&.*&(\d|10)&(\d|10)", line)  # times are 0 to 10
            fault = (
                f"{path}: {line!r} is not Category&VideoID&Quality&Start&End with a "
                "category of Annotations.txt and 0 <= Start < End <= 10, or 0 and 0"
            )
            require(match and match[1] in self.classes, fault)
            category, video, *times = match.groups()
            start, end = map(int, times)
            require(start < end or start == end == 0, fault)
            self.clips.append((self.classes.index(category), start, end))
            self.videos.append(video)
            self.about.append((category, end - start))

        self.extra = []
        if extra_audio:
            features = read_features(extra_audio, rows)
            for line in lines:
                require(line in features, f"{line!r} of {split}Set.txt is not in Annotations.txt")
                self.extra.append(features[line])
        self.stats = stats or find_stats(root, "ave", size, self.classes)
        self.kept = {}  # see read_clip

    def __len__(self):
        return len(self.clips)

    def files(self, i):
        return video_files(self.root, self.videos[i])

    def paths_and_sound(self, i):
        """The first ten seconds. A shorter clip goes on with its last frame, and in silence."""
        paths, wav = self.files(i)
        sound = read_wav(wav)
        paths = by_second(paths, sound)
        paths += [paths[-1]] * 10  # ten or more now
        return paths[:10], seconds_of(sound, 10)  # (10, 16000)

    def __getitem__(self, i):
        label, start, end = self.clips[i]
        frames, spectrograms = read_clip(self, i)

        # Second t holds the event if start <= t < end, otherwise background.
        labels = torch.full((10,), len(self.classes))
        labels[start:end] = label
        if self.extra:
            return frames, spectrograms, self.extra[i], labels
        return frames, spectrograms, labels


def read_features(path, rows):
    """An .npy of shape (rows of Annotations.txt, 10, 128) -> {row: (10, 128) float32}."""
    try:
        features = np.load(path).astype(np.float32)
    except Exception as error:  # numpy documents only some of what it raises here
        raise InputError(f"{path} is not an .npy of numbers ({error})") from None
    wanted = (len(rows), 10, 128)
    require(features.shape == wanted, f"{path} has shape {features.shape}, not {wanted}")
    return dict(zip(rows, torch.from_numpy(features)))


# ---------------------------------------------------------------- AVSBench S4


class AVSBenchDataset(Dataset):
    """AVSBench S4 (Zhou et al., ECCV 2022): five seconds, and masks of the one thing that sounds.

        root/s4_meta_data.csv     with the columns name, category and split
        root/s4_data/visual_frames/SPLIT/CATEGORY/NAME/NAME_{1..5}.png
        root/s4_data/gt_masks/SPLIT/CATEGORY/NAME/NAME_{1..5}.png     in train NAME_1.png alone
        root/s4_data/audio_wav/SPLIT/CATEGORY/NAME.wav

    item: frames (5, 3, S, S), spectrograms (5, S, S), masks (1 in train, else 5, M, M) of 0 and 1

    M is mask_size, the size of the mask files (224). A mask may be empty.
    """

    def __init__(self, root, split, size, stats=None):
        self.root = root
        self.split = split
        self.size = size

        path = f"{root}/s4_meta_data.csv"
        self.videos = []  # (name, category)
        try:
            rows = [*csv.DictReader(read_lines(path), strict=True)]
        except csv.Error as error:
            raise InputError(f"{path}: {error}; is a quotation mark left open?") from None
        for row in rows:
            name, category, part = map(row.get, ("name", "category", "split"))
            require(
                name and category and part in ("train", "val", "test"),
                f"{path}: no name, category or split, the columns that line 1 names, in {row}",
            )
            if part == split:
                self.videos.append((name, category))
        require(self.videos, f"{path} lists no {split} clips")
        self.about = [(category, 5) for _, category in self.videos]

        # All masks have the size of the first: a batch of them is one tensor.
        _, masks, _ = self.files(0)
        self.mask_size = open_image(masks[0]).width
        self.stats = stats or find_stats(root, "avs", size)
        self.kept = {}  # see read_clip

    def __len__(self):
        return len(self.videos)

    def files(self, i):
        name, category = self.videos[i]
        folder = f"{self.root}/s4_data"
        clip = f"{self.split}/{category}/{name}"
        count = 1 if self.split == "train" else 5  # in train the first frame alone has a mask
        frames = [f"{folder}/visual_frames/{clip}/{name}_{k}.png" for k in range(1, 6)]
        masks = [f"{folder}/gt_masks/{clip}/{name}_{k}.png" for k in range(1, count + 1)]
        return frames, masks, f"{folder}/audio_wav/{clip}.wav"

    def paths_and_sound(self, i):
        """The five frames and seconds. Frame k is from the end of second k."""
        frames, _, wav = self.files(i)
        return frames, seconds_of(read_wav(wav), 5)  # (5, 16000)

    def __getitem__(self, i):
        # The release resizes in the net, bicubic too (AVS/avs_scripts/avs_s4/model/
        # PVT_AVSModel.py:435). Masks keep their size.
        frames, spectrograms = read_clip(self, i)
        _, masks, _ = self.files(i)
        masks = torch.stack([read_mask(path, self.mask_size) for path in masks])
        return frames, spectrograms, masks


def read_mask(path, size):
    """(size, size) of 0. and 1., from a file of black and one colour, or of greys from 0 to 255.

    Black and one colour: {0, 1}, {0, 2}, {0, 255}, or a palette's. Greys: above half is 1; they
    come from resizing, so there are many. A few values may have another meaning and are refused:
    {0, 1, 2} counts sources in AVSBench's other subsets, {0, 1, 255} may mark pixels to leave out.

    The release converts to one bit (AVS/avs_scripts/avs_s4/dataloader.py:27,153), which turns a
    file of {0, 1} black and dithers greys.
    """
    image = open_image(path)
    fault = f"make all masks square and of one size, here {size}"
    require(image.size == (size, size), f"{path} is {image.width} x {image.height}; {fault}")
    pixels = functional.pil_to_tensor(image)  # (4, size, size)
    require(pixels[3].min() == 255, f"{path} has transparent pixels; save it as black and white")
    colours = pixels[:3]
    mask = colours.amax(0)  # (size, size)
    inside = colours[:, mask > 0]  # (3, n)
    if (inside == inside[:, :1]).all():  # one colour, or none
        return (mask > 0).float()
    is_grey = (inside == inside[0]).all()
    values = mask.unique().tolist()
    fault = f"{path} is neither black and one colour nor greys from 0 to 255; it has {values[:9]}"
    require(is_grey and len(values) > 8 and values[-1] > 127, fault)
    return (mask > 127).float()


# ---------------------------------------------------------------- MUSIC-AVQA


class MusicAVQADataset(Dataset):
    """MUSIC-AVQA (Li et al., CVPR 2022): a question about a video of music, mostly a minute long.

        root/avqa-train.json avqa-val.json avqa-test.json   the data set's data/json
        root/video_frames/ID/*.jpg                          one frame a second
        root/raw_audio/ID.wav

    item: frames (T, 3, S, S), spectrograms (T, S, S), question (W,) int64, answer () int64

    The T moments lie evenly over the video. vocabulary comes from the training questions unless it
    is given (a checkpoint keeps it): "words" and "answers" in the order in which they appear,
    "<pad>" first (93 and 42 in the real data), and "length" W of the longest question (14).
    """

    def __init__(self, root, split, size, stats=None, vocabulary=None, moments=10):
        self.root = root
        self.size = size
        self.count = moments
        self.questions = read_questions(f"{root}/avqa-{split}.json")
        vocabulary = vocabulary or make_vocabulary(read_questions(f"{root}/avqa-train.json"))
        self.vocabulary = vocabulary

        # Refuse a word or an answer that training lacks now, not in the middle of a test.
        for question in self.questions:
            fault = f"avqa-{split}.json: no training question has the answer {question['answer']!r}"
            require(question["answer"] in vocabulary["answers"], fault)
            question["indices"] = encode(question["words"], vocabulary)
        self.videos = [question["video"] for question in self.questions]
        self.about = [(question["answer"], moments) for question in self.questions]
        self.stats = stats or find_stats(root, "avqa", size)
        self.kept = {}  # see read_clip

    def __len__(self):
        return len(self.questions)

    def files(self, i):
        return video_files(self.root, self.videos[i])

    def paths_and_sound(self, i):
        """Frames and sound of T seconds.

        A video of n frames, one a second, has n seconds, however long its sound is: 60.019 s of
        sound beside 60 frames must not shift the seconds of the sound against the frames.
        """
        paths, wav = self.files(i)
        sound = read_wav(wav)
        paths = by_second(paths, sound)  # n
        seconds = seconds_of(sound, len(paths))  # (n, 16000)
        at = evenly(len(paths), self.count)
        return [paths[second] for second in at], seconds[at]  # (T, 16000)

    def __getitem__(self, i):
        question = self.questions[i]
        frames, spectrograms = read_clip(self, i)
        answer = self.vocabulary["answers"].index(question["answer"])
        return frames, spectrograms, question["indices"], torch.tensor(answer)


def evenly(length, count):
    """The numbers of `count` seconds that lie evenly over a video of `length` seconds.

    Truncated as in the release (AVQA/net_grd_avst/dataloader_avst.py:187): 60 seconds and 10
    moments give 0 6 13 19 26 32 39 45 52 59. Frame and sound of a moment are of the same second;
    the release takes 1.95 s of sound on another grid (dataloader_avst.py:136).
    """
    return np.linspace(1, length, count, dtype=int) - 1


def read_questions(path):
    """The questions of one json file: dicts of video, type, words and answer."""
    rows = read_json(path)
    require(isinstance(rows, list) and rows, f"{path} should hold a list of questions")

    questions = []
    for number, row in enumerate(rows, 1):
        try:
            modality, kind = json.loads(row["type"])  # "Audio-Visual", "Counting"
            values = json.loads(row["templ_values"])
            question = {
                "video": str(row["video_id"]),
                "type": (modality, kind),
                "words": fill_template(row["question_content"], values),
                "answer": str(row["anser"]),  # [sic]
            }
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}, question {number}: missing or wrong: {error}") from None
        questions.append(question)
    return questions


def fill_template(text, values):
    """The words of a question: "Is the <Object> loud?" and ["flute"] -> Is the flute loud.

    As in the release (dataloader_avst.py:235-242) each word with a "<" becomes the next value.
    """
    words = words_of(text)
    used = 0
    for position, word in enumerate(words):
        if "<" in word:
            words[position] = str(values[used])
            used += 1
    return words


def words_of(text):
    """The words of a question without its question mark, of which one template has a full-width
    one."""
    return re.sub(r"[\s?\uff1f]+$", "", text).split()


def make_vocabulary(questions):
    """Words and answers in the order of first appearance, and the longest question's length."""
    words = ["<pad>"]
    for question in questions:
        words += question["words"]
    return {
        "words": list(dict.fromkeys(words)),  # each once
        "answers": list(dict.fromkeys(question["answer"] for question in questions)),
        "length": max(len(question["words"]) for question in questions),
    }


def encode(words, vocabulary):
    """Words -> their indices (W,), padded with 0. InputError for one that training has not."""
    known = vocabulary["words"]
    length = vocabulary["length"]
    for word in words:
        fault = f"no training question has the word {word!r}; known: {' '.join(known[1:])}"
        require(word in known, fault)
    fault = f"{' '.join(words)} has more than {length} words, the most that training has"
    require(len(words) <= length, fault)
    indices = [known.index(word) for word in words]
    return torch.tensor(indices + [0] * (length - len(words)))


class NegativeFrames(Dataset):
    """Training items of MUSIC-AVQA with negatives for the grounding's match loss.

    item: as MusicAVQADataset's, before the answer negatives (T, 3, S, S): frames of other videos

    As in the release (dataloader_avst.py:196-229), they are drawn anew in each epoch. They depend
    on (seed, epoch, item) alone, so a resumed run draws the same. The training loop gives the epoch
    before the loader's workers start; persistent workers would keep the epoch of their start.
    """

    def __init__(self, dataset, seed):
        self.dataset = dataset  # MusicAVQADataset
        self.seed = seed
        self.epoch = 0
        self.videos = list(dict.fromkeys(dataset.videos))
        require(len(self.videos) > 1, f"{dataset.root} needs two videos to draw negatives")

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        frames, spectrograms, question, answer = self.dataset[i]

        # A generator of its own for each item: neither the order of the items nor the number of
        # workers changes what is drawn.
        rng = np.random.default_rng([self.seed, self.epoch, i])
        others = [video for video in self.videos if video != self.dataset.videos[i]]

        drawn = []
        for _ in frames:  # for each moment, a video and one of its frames
            paths, _ = video_files(self.dataset.root, rng.choice(others))
            drawn.append(rng.choice(paths))
        negatives = read_frames(drawn, self.dataset.size)
        return frames, spectrograms, question, negatives, answer


# ---------------------------------------------------------------- UCF101


class UCF101Dataset(Dataset):
    """UCF101 (Soomro et al., 2012): the action in a clip of some seconds.

        root/classInd.txt trainlist01.txt testlist01.txt   the official lists of split 1
        root/video_frames/ID/*.jpg                         8 frames a second or more
        root/raw_audio/ID.wav                              half of the classes have none

    item: frames (16, 3, S, S), spectrograms (8, S, S), label () int64

    No official list has a val split: here it is groups 24 and 25 of training (the clips of a group
    are cut from one video, so groups must not be torn apart). The release has no code for UCF101.
    """

    def __init__(self, root, split, size, stats=None):
        self.root = root
        self.size = size
        self.classes = [line.split()[-1] for line in read_lines(f"{root}/classInd.txt")]

        name = "testlist01" if split == "test" else "trainlist01"
        path = f"{root}/{name}.txt"
        self.videos = []
        self.about = []
        for line in read_lines(path):
            match = re.fullmatch(r"(\w+)/(\w+_g(\d\d)_c\d\d)\.avi(?: \d+)?", line)
            require(
                match and match[1] in self.classes,
                f"{path}: {line!r} is not CLASS/v_NAME_gGG_cCC.avi with a class of classInd.txt",
            )
            # The folder names the class. File names differ in case: the real list has
            # HandstandPushups/v_HandStandPushups_g01_c01.avi.
            folder, video, group = match.groups()
            part = "val" if int(group) >= 24 else "train"  # of the training list
            if split in ("test", part):
                self.videos.append(video)
                self.about.append((folder, 8))
        require(self.videos, f"{path} lists no {split} clips (groups 24 and 25 are val)")
        self.stats = stats or find_stats(root, "ucf101", size)
        self.kept = {}  # see read_clip

    def __len__(self):
        return len(self.videos)

    def files(self, i):
        """The frames of the clip and its sound, None if it has none."""
        paths, wav = video_files(self.root, self.videos[i])
        return paths, wav if exists(wav) else None

    def paths_and_sound(self, i):
        """16 frames, evenly over the clip as VideoMAE takes them, and eight seconds of sound.

        Each second is centred between two of the frames.
        """
        paths, wav = self.files(i)
        frames = [paths[(2 * k + 1) * len(paths) // 32] for k in range(16)]

        sound = read_wav(wav) if wav else torch.zeros(0)
        padded = pad(sound, (SAMPLE_RATE // 2, SAMPLE_RATE // 2))
        # The second that begins at sample c of the padded sound is centred at c of the sound.
        centres = [(2 * k + 1) * len(sound) // 16 for k in range(8)]
        seconds = torch.stack([padded[c : c + SAMPLE_RATE] for c in centres])  # (8, 16000)
        return frames, seconds

    def __getitem__(self, i):
        action, _ = self.about[i]
        frames, spectrograms = read_clip(self, i)
        return frames, spectrograms, torch.tensor(self.classes.index(action))


# ---------------------------------------------------------------- all data sets
# What follows works with any of the four.


def read_clip(dataset, i):
    """The frames (T, 3, S, S) and the spectrograms (T, S, S) of item i.

    They are kept: those of a whole toy, which fits the memory, else those of the last video, since
    many questions of MUSIC-AVQA in a row are about one video.
    """
    video = dataset.videos[i]
    if video not in dataset.kept:
        paths, seconds = dataset.paths_and_sound(i)
        frames = read_frames(paths, dataset.size)
        spectrograms = spectrograms_of(seconds, dataset.size, dataset.stats)
        if not is_toy(dataset.root):
            dataset.kept.clear()
        dataset.kept[video] = (frames, spectrograms)
    return dataset.kept[video]


DATASETS = {
    "ave": AVEDataset,
    "avs": AVSBenchDataset,
    "avqa": MusicAVQADataset,
    "ucf101": UCF101Dataset,
}


def distinct_items(dataset):
    """An item for each video: many questions of MUSIC-AVQA share one."""
    return {video: i for i, video in enumerate(dataset.videos)}.values()  # the last one of each


# ---------------------------------------------------------------- command: extract


def extract_video(path, out):
    """One video -> OUT/video_frames/ID/0001.jpg ... and OUT/raw_audio/ID.wav. Returns the ID.

    The ID is the file's name without its ending. There is a frame from the middle of each second.
    The wav is moved into place last: if it exists, the video is complete and is skipped.
    """
    shown = path.encode(errors="replace").decode()
    require(path == shown, f"{shown}: its name is not UTF-8, but lists of IDs are; rename it")
    video = Path(path).stem
    frames, wav = video_paths(out, video)
    if exists(wav):
        require(exists(frames), f"{wav} is there without {frames}; move it away")
        return video
    if not exists(f"{frames}/sound.wav"):  # it is there if a call was stopped before os.replace
        require(not exists(frames), f"{frames} is there without {wav}; move it away")
        require(shutil.which("ffmpeg"), "no ffmpeg; install it: apt, brew or conda install ffmpeg")
        unfinished = frames + ".partial"
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was stopped
        os.makedirs(unfinished)
        try:
            run_ffmpeg(path, unfinished)
            os.replace(unfinished, frames)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # if there was a fault
    make_folder_of(wav)
    os.replace(f"{frames}/sound.wav", wav)
    return video


def run_ffmpeg(path, folder):
    """One video -> FOLDER/0001.jpg ... and FOLDER/sound.wav.

    ffmpeg takes a video that is cut or damaged for a shorter one: InputError unless frames and
    sound are as long as the video says, up to a second.
    """
    # An ID may begin with "-" or hold "%": ffmpeg gets an absolute path to read, and writes names
    # of ours within its own folder.
    reading = ["ffmpeg", "-nostdin", "-v", "error", "-i", abspath(path)]
    writing = (
        # fps=1 takes the middle of each second; -r 1 would not (the release: -r 8,
        # AVE/scripts/extract_frames.py:11).
        "-map 0:v:0 -vf fps=1 -q:v 2 %04d.jpg "
        # Sound that starts late, or has gaps, keeps its place: silence fills them.
        "-map 0:a:0 -af aresample=async=1:first_pts=0 -ac 1 -ar 16000 -c:a pcm_s16le sound.wav"
    )
    done = subprocess.run(
        reading + writing.split(), cwd=folder, capture_output=True, errors="replace"
    )
    said = " ".join(done.stderr.split())[:500]  # a damaged video can fill pages
    require("'0:a:0' matches no streams" not in said, f"{path} has no sound")
    require("'0:v:0' matches no streams" not in said, f"{path} has no pictures")
    require(done.returncode == 0, f"{path} wants pictures and sound that ffmpeg can read: {said}")

    frames = len(os.listdir(folder)) - 1  # all files but sound.wav
    sound = len(read_wav(f"{folder}/sound.wav")) / SAMPLE_RATE
    require(frames > 0, f"{path} is too short for one frame a second: it lasts {sound:.1f} s")
    seconds = promised_length(path) or sound
    require(
        abs(sound - seconds) <= 1 and abs(frames - seconds) <= 1.5,  # frames are rounded
        f"{path} has {frames} frames, one a second, {sound:.1f} s of sound and, by its header, "
        f"{seconds:.1f} s: is it cut or damaged? Mend it or leave it out. {said}",
    )
    if said:
        print(f"{path} is extracted, but ffmpeg says: {said}")


def promised_length(path):
    """How many seconds a video lasts by its own header; 0 if that does not say."""
    entries = "format=format_name,duration:stream=nb_frames,time_base"
    command = f"ffprobe -v quiet -select_streams v:0 -of json -show_entries {entries}".split()
    header = json.loads(subprocess.check_output([*command, abspath(path)]))
    seconds = float(header["format"].get("duration", 0))
    video = header["streams"][0]
    if header["format"]["format_name"] == "avi" and "nb_frames" in video:
        # ffprobe shortens the duration of an avi that was cut, but not the count of its frames.
        # A frame lasts "1/25", in seconds.
        seconds = max(seconds, int(video["nb_frames"]) * float(Fraction(video["time_base"])))
    return seconds


def extract(videos, root):
    """Extract all videos of a folder. Returns the exit code. ffmpeg itself uses all processors."""
    paths = sorted(Path(videos).glob("[!.]*"))
    require(paths, f"{videos} is no folder of videos")
    stems = Counter(path.stem for path in paths)
    faults = []
    for path in progress(paths, "extract"):
        try:
            require(stems[path.stem] == 1, f"{path}: another file has the same name; rename one")
            extract_video(str(path), root)
        except InputError as error:
            faults.append(error)  # and go on: one video must not end the others
    for fault in faults:
        print(fault)
    print(f"{len(paths) - len(faults)} of {len(paths)} videos are in {root}")
    print(f"Next, with the annotations in place: python data.py check TASK {shlex.quote(root)}")
    return 1 if faults else 0


# ---------------------------------------------------------------- commands: check, stats


def check(task, root, size):
    """Read every item of the three splits, print what is wrong. Returns the exit code."""
    datasets = {}  # by the name of the split
    faults = []
    stats = None
    for split in ("train", "val", "test"):
        try:
            dataset = DATASETS[task](root, split, size, stats)
        except InputError as error:
            faults.append(f"{split}: {error}")
            continue
        stats = dataset.stats  # the other splits do not print the line about them again
        datasets[split] = dataset
        for i in progress(distinct_items(dataset), f"check {split}"):
            try:
                check_item(dataset, i)
            except InputError as error:
                faults.append(f"{split}: {error}")
        print(f"{split}: {len(dataset)} items")
    print_classes(datasets)
    for fault in faults:
        print(fault)
    if faults:
        print(f"Mend these {len(faults)} before training.")
        return 1
    print(f"All items can be read. Next: python train.py {task} --data {shlex.quote(root)}")
    return 0


def check_item(dataset, i):
    """InputError, with the paths, if an item cannot be read or if its frames have a gap."""
    frames, *_, wav = dataset.files(i)
    before = None
    for path in frames:
        number = int(re.search(r"(\d+)\.\w+$", path)[1])  # of 0001.jpg, or of NAME_1.png
        follows = number < 2 if before is None else number == before + 1
        require(follows, f"{path} is there, but the frame before it is missing; extract all again")
        open_image(path)  # also a frame that only a negative of MUSIC-AVQA may be
        before = number
    try:
        dataset.__getitem__(i)
    except InputError:
        raise
    except Exception as error:  # whatever it is: the other items are still to be read
        raise InputError(f"{dirname(frames[0])} or {wav}: {error!r}") from None


def print_classes(datasets):
    """The clips and seconds of each class in each split, and which splits share videos."""
    names = []
    clips = Counter()
    seconds = Counter()
    for split, dataset in datasets.items():
        for name, length in dataset.about:
            names.append(name)
            clips[name, split] += 1
            seconds[name, split] += length
        names += getattr(dataset, "classes", [])  # also those without a clip: misspelt ones
    for name in dict.fromkeys(names):
        row = [f"{split} {clips[name, split]} ({seconds[name, split]} s)" for split in datasets]
        print(f"{name}: {', '.join(row)}")
    for one, other in itertools.combinations(datasets, 2):
        shared = {*datasets[one].videos} & {*datasets[other].videos}
        if shared:
            print(f"{one} and {other} share {len(shared)} videos, {min(shared)} for example")


def measure_stats(task, root, size):
    """[mean, std] of the training spectrograms before normalisation, kept in ROOT.

    As the authors measured theirs (AVE/compute_audio_mean.py:95-111): the mean of all seconds'
    means and the mean of their stds. What is no sound is left out: clips without any (UCF101 has
    them), and the rows with which fbank pads an image.
    """
    raw = (0.0, 0.5)  # with these, fbank's (x - mean) / (2 std) changes nothing
    dataset = DATASETS[task](root, "train", size, raw)
    measured = []  # (mean, std) of each second
    for i in progress(distinct_items(dataset), "stats"):
        _, seconds = dataset.paths_and_sound(i)  # (T, 16000)
        if not seconds.any():
            continue
        for spectrogram in spectrograms_of(seconds, size, raw):
            rows = spectrogram[spectrogram.any(1)]  # padding is exactly zero
            measured.append((rows.mean().item(), rows.std().item()))
    require(measured, f"no training clip of {root} has sound")
    stats = np.mean(measured, 0).tolist()
    write_lines([json.dumps(stats)], stats_path(root, size))
    return stats


def progress(iterable, text):
    """A progress bar on a terminal, nothing in a log file."""
    return tqdm(iterable, text, leave=False, disable=None, ncols=79)


# ---------------------------------------------------------------- files, whole or not at all
# A run may be stopped at any moment. Its checkpoints and lists go to a temporary name first and get
# their own name when they are complete, so that no reader ever meets half a file.


def make_folder_of(path):
    """The folder that a file is to be in, which for a name alone is the current one."""
    os.makedirs(dirname(abspath(path)), exist_ok=True)


def write_atomic(path, content):
    """Write bytes so that the file is there whole or not at all, even after a power cut."""
    unfinished = path + ".partial"
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name is
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)  # it is there if the disk was full, for example


def write_lines(lines, path):
    """Lines of text, whole or not at all."""
    text = "\n".join(lines) + "\n"
    write_atomic(path, text.encode())


def save_tensors(tensors, path):
    """torch.save, whole or not at all."""
    file = io.BytesIO()
    torch.save(tensors, file)
    write_atomic(path, file.getvalue())


def load_tensors(path):
    """torch.load for tensors alone: a file from a stranger cannot run code."""
    require(exists(path), f"no {path}: wrong path, no epoch is done, or the run is complete")
    try:
        # VideoMAE's own checkpoints keep their settings in an argparse.Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch documents no list of what it raises here
        raise InputError(f"{path} is no checkpoint: {what_is(path, str(error))}") from None


def what_is(path, error):
    """What a file is that torch.load cannot read, by torch's error or by its first bytes."""
    blocked = re.search(r"GLOBAL (\S+)", error)
    if blocked:
        return (
            f"it holds a {blocked[1]}, and objects may run code; if you trust it, torch.load it "
            "with weights_only=False and save its tensors alone"
        )
    with open(path, "rb") as file:
        start = file.read(100)
    if start[8:9] == b"{":
        return "it is a safetensors file; load it with safetensors.torch, then torch.save it"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS is in its place; get the file: git lfs pull"
    if start.lstrip().startswith(b"<"):
        return "it is a web page; delete it and start again, or download the file itself"
    return (
        f"it is cut, or no file of torch.save: delete it, start again; it begins with {start[:9]}"
    )


# ---------------------------------------------------------------- the toys: looks and timbres
# Four instruments, each with a shape and a colour to see and a timbre to hear. Place, size, pitch,
# loudness and noise are drawn by chance.

TOY_SIZE = 32  # pixels a side: what the nano backbone takes
TOY_CLIPS = {
    "ave": {"train": 480, "val": 60, "test": 120},
    "avs": {"train": 480, "val": 60, "test": 80},
    "avqa": {"train": 320, "val": 40, "test": 120},  # videos, each with several questions
    "ucf101": {"train": 32, "val": 4, "test": 14},  # of each of nine actions
}
COLOURS = {
    "red": (230, 60, 50),
    "green": (60, 190, 80),
    "blue": (70, 100, 235),
    "yellow": (235, 205, 60),
}


class Instrument(NamedTuple):
    """What one looks and sounds like."""

    colour: str
    power: float  # p of the outline |x|^p + |y|^p = 1: star, diamond, circle, square
    hertz: float  # its lowest tone
    partials: tuple  # all of its tones, in multiples of the lowest
    strokes: float  # per second
    fade: float  # after a stroke, per second; 0: the tone is held


INSTRUMENTS = {
    "bell": Instrument("red", 2, 520, (1, 2.76, 5.4), 2, 5),  # partials that do not harmonise
    "flute": Instrument("green", 1, 1500, (1,), 1, 0),
    "drum": Instrument("blue", 8, 90, (1,), 4, 12),
    "horn": Instrument("yellow", 2 / 3, 220, (1, 2, 3, 4, 5, 6, 7, 8), 1, 0),
}
NAMES = list(INSTRUMENTS)


def record(name, seconds, amplitudes, rng):
    """Noise and, unless the name is None, an instrument of random pitch in it: (N,) float32.

    The amplitude, root mean square of full scale, lies between the two amplitudes."""
    t = np.arange(seconds * SAMPLE_RATE, dtype=np.float32) / SAMPLE_RATE  # (N,), in seconds
    sound = 0.004 * rng.standard_normal(len(t), dtype=np.float32)
    if name is None:
        return sound
    instrument = INSTRUMENTS[name]
    t = t + rng.uniform()  # it starts somewhere in its pattern of strokes
    hertz = instrument.hertz * 2 ** rng.uniform(-0.3, 0.3)  # a third of an octave up or down
    tones = [np.sin(2 * np.pi * hertz * partial * t) for partial in instrument.partials]
    since_stroke = t % (1 / instrument.strokes)
    played = sum(tones) * np.exp(-instrument.fade * since_stroke)
    amplitude = rng.uniform(*amplitudes) / np.sqrt(np.mean(played**2))
    return sound + amplitude * played


class Thing(NamedTuple):
    """What is seen in a scene; place and radius are in units of the image's side."""

    shape: str  # that of this instrument
    colour: str  # that of this instrument, mostly the same
    x: float
    y: float
    radius: float


def place(shape, colour, radii, rng):
    """A thing of random size at a random place, whole within the image."""
    radius = rng.uniform(*radii)
    x, y = rng.uniform(radius, 1 - radius, 2)
    return Thing(shape, colour, x, y, radius)


def render(things, rng):
    """A noisy scene: an image (3, S, S) uint8, and the mask (S, S) of each thing.

    Each has the whole of its outline as its mask: where two overlap, both have it."""
    y, x = (np.indices((TOY_SIZE, TOY_SIZE)) + 0.5) / TOY_SIZE  # (S, S) each
    image = rng.uniform(40, 110, (3, 1, 1))  # the background
    masks = []
    for thing in things:
        power = INSTRUMENTS[thing.shape].power
        dx = abs(x - thing.x) / thing.radius
        dy = abs(y - thing.y) / thing.radius
        mask = dx**power + dy**power < 1  # (S, S), what is within the outline
        colour = COLOURS[INSTRUMENTS[thing.colour].colour]
        image = np.where(mask, np.reshape(colour, (3, 1, 1)), image)  # (3, S, S)
        masks.append(torch.from_numpy(mask))
    image = image + 14 * rng.standard_normal((3, TOY_SIZE, TOY_SIZE))  # grain
    return torch.from_numpy(np.clip(image, 0, 255)).byte(), masks


def toy_images(count, rng):
    """Images without sound, normalised (count, 3, S, S), and their classes (count,), 0 to 15.

    On them the nano backbone is pretrained: they stand for ImageNet. A class is one of the four
    shapes in one of the four colours, though an instrument has a colour of its own."""
    images = []
    classes = torch.from_numpy(rng.integers(16, size=count))
    for number in classes:
        thing = place(NAMES[number // 4], NAMES[number % 4], (0.12, 0.3), rng)
        image, _ = render([thing], rng)
        images.append(image)
    images = torch.stack(images) / 255
    return functional.normalize(images, IMAGENET_MEAN, IMAGENET_STD), classes


# ---------------------------------------------------------------- the toys: four data sets


def is_toy(root):
    """Whether a data folder was written by make_toy."""
    return exists(f"{root}/toy.json")


def make_toy(task, root):
    """Write the toy data set of a task, complete or not at all."""
    require(not exists(root), f"{root} is there already; remove it or choose another folder")
    makers = {"ave": toy_ave, "avs": toy_avs, "avqa": toy_avqa, "ucf101": toy_ucf101}
    unfinished = root.rstrip("/") + ".partial"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was stopped
    makers[task](unfinished, np.random.default_rng(0))
    measure_stats(task, unfinished, TOY_SIZE)
    write_lines([json.dumps({"task": task})], f"{unfinished}/toy.json")
    os.replace(unfinished, root)


def write_image(path, image):
    """(3, height, width) or (height, width) uint8 as jpg or png. OSError on a full disk."""
    make_folder_of(path)
    functional.to_pil_image(image).save(path, quality=95)  # a png has no quality


def write_wav(path, sound):
    """(N,) at 16 kHz as a mono 16-bit wav."""
    make_folder_of(path)
    samples = (np.clip(sound, -1, 1) * 32767).astype("<i2")
    with wave.open(path, "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes(samples.tobytes())


def write_video(root, video, scenes, sound):
    """A toy video as it is after extraction: the images of scenes (see render), and their sound
    (N,), if any."""
    folder, wav = video_paths(root, video)
    for number, (image, _) in enumerate(scenes, 1):
        write_image(f"{folder}/{number:04d}.jpg", image)
    if sound is not None:
        write_wav(wav, sound)


def toy_clips(task):
    """(split, name) of each clip of a toy; one name in four has a dash in front, as on YouTube."""
    for split, count in TOY_CLIPS[task].items():
        for i in progress(range(count), f"toy {task} {split}"):
            dash = "-" if i % 4 == 0 else ""
            yield split, f"{dash}{split}{i:04d}"


# Near things are large and loud, far things small and soft: radius in units of the image's side,
# amplitude as root mean square of full scale.
RADII = {"near": (0.26, 0.32), "far": (0.11, 0.15)}
AMPLITUDES = {"near": (0.1, 0.14), "far": (0.01, 0.014)}
MODERATE = (0.02, 0.1)  # amplitudes where loudness does not matter


def toy_ave(root, rng):
    """The AVE layout, with labels that only an exchange between the two streams can find.

    Near things are large and loud, far things are small and soft. A clip has one event of 3 to 7
    seconds, in which its instrument is seen and heard, and the loudness fits the size. The other
    seconds are background. In six of ten the same instrument is seen and heard as well, but the
    loudness does not fit: what sounds is another one of its kind, out of sight. In the rest it is
    silent, or unseen, or another instrument is seen or heard in its place.

    Worked example, `bell&train0007&good&2&6`. Capitals mean near, that is large or loud:

        second   0       1       2     3     4     5     6       7       8       9
        seen     BELL    -       bell  BELL  BELL  bell  bell    drum    BELL    bell
        heard    bell    bell    bell  BELL  BELL  bell  BELL    bell    -       BELL
        label    backgr. backgr. bell  bell  bell  bell  backgr. backgr. backgr. backgr.

    In seconds 2 and 3 (event) and 0 and 6 (background) a bell is seen and heard. No sum of what is
    seen and what is heard tells the two pairs apart: it is an XNOR of size and loudness. AVE's
    head is linear, so the streams have to meet before it, in the adapters."""
    lines = defaultdict(list)  # by split
    for split, video in toy_clips("ave"):
        event, other = rng.permutation(NAMES)[:2]
        length = rng.integers(3, 8)  # of the event, in seconds
        start = rng.integers(0, 11 - length)  # its first second
        scenes = []
        sounds = []
        for t in range(10):
            seen = event
            heard = event
            distance, other_distance = rng.permutation(["near", "far"])
            sounds_like = distance  # near is large to see and loud to hear
            if not start <= t < start + length:  # background, of one kind by chance
                kind = rng.integers(10)
                if kind < 6:
                    sounds_like = other_distance
                elif kind == 6:
                    heard = None
                elif kind == 7:
                    seen = None
                elif kind == 8:
                    heard = other
                else:
                    seen = other
            things = [place(seen, seen, RADII[distance], rng)] if seen else []
            scenes.append(render(things, rng))
            sounds.append(record(heard, 1, AMPLITUDES[sounds_like], rng))
        write_video(root, video, scenes, np.concatenate(sounds))
        lines[split].append(f"{event}&{video}&good&{start}&{start + length}")

    annotations = ["Category&VideoID&Quality&StartTime&EndTime"]
    for split, rows in lines.items():
        write_lines(rows, f"{root}/{split}Set.txt")
        annotations += rows
    write_lines(annotations, f"{root}/Annotations.txt")


def film(names, count, rng):
    """Images and masks of `count` scenes in which instruments circle around the middle.

    They stand evenly on a circle, so that they hardly overlap and hardly leave the image."""
    radius = rng.uniform(0.17, 0.22)
    start = rng.uniform(0, 2 * np.pi)
    speed = rng.uniform(-0.5, 0.5)  # radians per scene
    scenes = []
    for t in range(count):
        things = []
        for k, name in enumerate(names):
            angle = start + speed * t + 2 * np.pi * k / len(names)
            x = 0.5 + 0.27 * np.cos(angle)
            y = 0.5 + 0.27 * np.sin(angle)
            things.append(Thing(name, name, x, y, radius))
        scenes.append(render(things, rng))
    return scenes


def toy_avs(root, rng):
    """The AVSBench S4 layout: two or three instruments circle, and one of them sounds.

    The mask is that one's. Only the sound tells which one it is.

    Worked example: a bell, a drum and a horn are seen in all five frames, and a drum is heard. The
    masks are the drum's. An eye alone has to guess one of three. It does best to answer "nothing",
    since each pixel of the drum belongs to the mask with a probability of one third."""
    rows = ["name,start,category,split"]
    for split, name in toy_clips("avs"):
        seen = rng.permutation(NAMES)[: rng.integers(2, 4)]
        sounding = rng.integers(len(seen))  # which one is heard
        category = seen[sounding]
        folder = f"{root}/s4_data"
        clip = f"{split}/{category}/{name}"
        for k, (image, masks) in enumerate(film(seen, 5, rng), 1):
            write_image(f"{folder}/visual_frames/{clip}/{name}_{k}.png", image)
            if k == 1 or split != "train":  # in training the first frame alone has a mask
                mask = 255 * masks[sounding].byte()  # (S, S)
                write_image(f"{folder}/gt_masks/{clip}/{name}_{k}.png", mask)
        write_wav(f"{folder}/audio_wav/{clip}.wav", record(category, 5, MODERATE, rng))
        rows.append(f"{name},0,{category},{split}")
    write_lines(rows, f"{root}/s4_meta_data.csv")


def questions(seen, heard, asked):
    """(type, text, values of its template, answer) of each question about a video.

    Type and values are JSON texts, as in the real files. `asked` is the instrument whose colour the
    last one names."""
    count = "two" if len(seen) == 2 else "one"
    sounding = "one" if heard in seen else "zero"
    is_it = "yes" if heard == asked and heard in seen else "no"
    colour = INSTRUMENTS[asked].colour
    return [
        ('["Visual", "Counting"]', "How many instruments are in the video?", "[]", count),
        ('["Audio", "Instrument"]', "Which instrument is sounding?", "[]", heard),
        (
            '["Audio-Visual", "Counting"]',
            "How many instruments in the video are sounding?",
            "[]",
            sounding,
        ),
        (
            '["Audio-Visual", "Existential"]',
            "Is the <Colour> one sounding?",
            f'["{colour}"]',
            is_it,
        ),
    ]


def toy_avqa(root, rng):
    """The MUSIC-AVQA layout: one or two instruments circle, and one instrument sounds.

    In half of the videos the last one seen is the one heard. In the others an unseen one sounds.

    Worked example: a bell and a drum are seen, and a horn is heard.

        Visual         How many instruments are in the video?             two
        Audio          Which instrument is sounding?                      horn
        Audio-Visual   How many instruments in the video are sounding?    zero
        Audio-Visual   Is the blue one sounding? (or: red, or: yellow)    no

    Were the drum heard, the last two answers would be "one" and "yes". The ear alone knows that no
    drum sounds, but not that no horn is there; the eye alone knows the reverse. No question asks
    what comes first or stands left: the published head pools seconds and places by weights that
    know no order."""
    rows = defaultdict(list)  # by split
    for split, video in toy_clips("avqa"):
        *seen, heard = rng.permutation(NAMES)[: rng.integers(2, 4)]
        if rng.uniform() < 0.5:
            heard = seen[-1]
        seconds = rng.integers(3, 7)  # of the video
        scenes = film(seen, seconds, rng)
        write_video(root, video, scenes, record(heard, seconds, MODERATE, rng))

        asked = rng.choice([*seen, heard])
        for kind, text, values, answer in questions(seen, heard, asked):
            row = {
                "video_id": video,
                "question_id": len(rows[split]),
                "type": kind,
                "question_content": text,
                "templ_values": values,
                "anser": answer,  # [sic]
            }
            rows[split].append(row)

    for split in rows:
        write_lines([json.dumps(rows[split], indent=1)], f"{root}/avqa-{split}.json")


def toy_ucf101(root, rng):
    """The UCF101 layout: nine actions, each a pair of something seen and something heard.

    A bell, a flute or a drum moves, to the sound of a horn, of a drum or, as in half of the real
    classes, to none. One sense alone knows one action in three."""
    lists = defaultdict(list)  # by name
    first_group = {"train": 8, "val": 24, "test": 1}  # two clips in each group
    pairs = list(itertools.product(("bell", "flute", "drum"), ("horn", "drum", "nothing")))
    for number, (seen, heard) in enumerate(progress(pairs, "toy ucf101"), 1):
        name = f"{seen}_to_{heard}"
        lists["classInd"].append(f"{number} {name}")
        for split, count in TOY_CLIPS["ucf101"].items():
            for i in range(count):
                video = f"v_{name}_g{first_group[split] + i // 2:02}_c{i % 2 + 1:02}"
                scenes = film([seen], 16, rng)
                sound = None if heard == "nothing" else record(heard, 2, MODERATE, rng)
                write_video(root, video, scenes, sound)
                if split == "test":
                    lists["testlist01"].append(f"{name}/{video}.avi")
                else:
                    lists["trainlist01"].append(f"{name}/{video}.avi {number}")
    for name, lines in lists.items():
        write_lines(lines, f"{root}/{name}.txt")


# ---------------------------------------------------------------- the command line


def run():
    """One command, as the module's docstring lists them. Returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["extract", "check", "stats", "toy"])
    parser.add_argument("source", help="a task; for extract the folder of videos")
    parser.add_argument("root", help="the folder of the data set")
    parser.add_argument("--size", type=int, default=192, help="of the images, in pixels")
    args = parser.parse_args()

    task = args.source
    root = args.root
    require(15 < args.size < 1000, "--size wants a number from 16 to 999")
    require(args.source and root, "the name of a folder is empty")
    if args.command == "extract":
        return extract(args.source, root)
    require(task in DATASETS, f"unknown task {task!r}; there are {', '.join(DATASETS)}")
    if args.command == "check":
        return check(task, root, args.size)
    if args.command == "stats":
        mean, std = measure_stats(task, root, args.size)
        print(f"mean {mean:.6f}  std {std:.6f}  (kept in {stats_path(root, args.size)})")
    else:
        make_toy(task, root)
    print(f"Next: python train.py {task} --data {shlex.quote(root)}")
    return 0


def main():
    """Run a command. What the user can mend ends in one line on stderr and exit code 2."""
    try:
        sys.exit(run())
    except (InputError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: stopped; run the same command again", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
