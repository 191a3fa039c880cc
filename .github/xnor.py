# SPDX-License-Identifier: MIT
"""The first picture of the README: which seconds of the toy ave does a net call an event?

    python train.py ave
    python train.py ave --latents 0 --out runs/late
    PYTHONPATH=. python .github/xnor.py runs/ave runs/late

Instruments are large or small, loud or soft, 40 seconds of each combination. The numbers are means
over the 40; the pictures are of the first, a bell. Written to xnor.png.
"""

import sys

import numpy as np
import torch

import data
import train


def matters_most(settings, facts, model):
    """As in look: the adapter of sound that lowers the test score most if its g_av is 0."""
    test = train.load_in_order(settings, "test", facts)

    def accuracy():
        return train.evaluate_ave(settings, facts, model, test)["accuracy"]

    scores = {}  # {name of an adapter: score}
    for name, adapter in train.adapters_with_latents(model.net).items():
        if name.startswith("sound"):
            scores[name] = train.score_without(adapter, accuracy)
    return min(scores, key=scores.get)


both, late = sys.argv[1:]
rng = np.random.default_rng(0)
frames = []
sounds = []
for size, loudness in (("near", "near"), ("near", "far"), ("far", "near"), ("far", "far")):
    for name in data.NAMES * 10:
        image, _ = data.render([data.place(name, name, data.RADII[size], rng)], rng)
        frames.append(data.functional.normalize(image / 255, data.IMAGENET_MEAN, data.IMAGENET_STD))
        sounds.append(torch.from_numpy(data.record(name, 1, data.AMPLITUDES[loudness], rng)))
frames = torch.stack(frames)  # (160,3,S,S)

rows = {}
for title, folder in (("both directions", both), ("late fusion", late)):
    settings, facts, model = train.open_run(folder, {})
    spectrograms = data.spectrograms_of(sounds, settings.image_size, facts["stats"])  # (160,S,S)
    logits = train.logits_of(settings, model, [frames[None], spectrograms[None]])[0]
    event = 1 - logits.softmax(-1)[:, -1]  # (160,), that it is any event and not background
    if folder == both:
        bells = [frames[::40], spectrograms[::40]]
        rows.update(train.rows_of(bells))
        name = matters_most(settings, facts, model)
        adapter = train.adapters_with_latents(model.net)[name]
        rows.update(train.rows_of_latents(settings, model, bells, name, adapter))
    rows[f"event? {title}"] = [f"{p:.2f}" for p in event.view(4, 40).mean(1).tolist()]
    print(f"{title}:", *rows[f"event? {title}"])
rows["true"] = ["1", "0", "0", "1"]
train.draw(rows, "xnor.png")
