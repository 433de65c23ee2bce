"""How long a stored model takes to open: reading, checking hashes, decoding every layer."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from evenbits.measure import Finding, Measurement, ProfileSubject
from evenbits.statistics import bootstrap_interval

from evenbits_tutorial.measure_options import LoadTimeOptions


class LoadTime:
    def __init__(self, options: LoadTimeOptions) -> None:
        self.options = options

    def profile(self, subject: ProfileSubject) -> Sequence[Finding]:
        """items: seconds of each time. The files are in the system's cache by then: no disk is measured."""
        tick = subject.progress(1 + self.options.repeats, "load-time")
        seconds = []
        for _ in range(1 + self.options.repeats):
            begun = time.perf_counter()
            subject.load()
            seconds.append(time.perf_counter() - begun)
            tick(1)
        items = np.array(seconds[1:])  # the first one also imports code
        low, high = bootstrap_interval(items)
        where = {"device": subject.device.type, "threads": torch.get_num_threads(), "repeats": self.options.repeats}
        fingerprint = {**subject.facts, **where}
        value = float(items.mean())
        return [Measurement("time_load", value, "s", "lower", low, high, fingerprint, items=items, volatile=True)]
