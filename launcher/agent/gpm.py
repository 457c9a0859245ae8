"""How busy a GPU's multiprocessors and tensor cores are, by NVML's GPM counters: from Hopper on.

GPM gives the activity between two samples; samples are taken in turn into two buffers.
"""

from __future__ import annotations

from typing import Any

import pynvml

METRICS = (pynvml.NVML_GPM_METRIC_SM_UTIL, pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL)


class Activity:
    """Two samples of one card."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._samples = [pynvml.nvmlGpmSampleAlloc(), pynvml.nvmlGpmSampleAlloc()]
        self._asked = pynvml.c_nvmlGpmMetricsGet_t()
        self._taken = 0

    @classmethod
    def open(cls, handle: Any) -> Activity | None:
        """None where the card or its driver has no such counters."""
        try:
            if not pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
                return None
            return cls(handle)
        except pynvml.NVMLError:
            return None

    def read(self) -> tuple[float | None, float | None]:
        """Parts of the multiprocessors that were busy and of the time that tensor cores worked, since the last reading."""
        now = self._samples[self._taken % 2]
        try:
            pynvml.nvmlGpmSampleGet(self._handle, now)
            self._taken += 1
            if self._taken < 2:
                return None, None
            asked = self._asked
            asked.version = pynvml.NVML_GPM_METRICS_GET_VERSION
            asked.numMetrics = len(METRICS)
            asked.sample1, asked.sample2 = self._samples[self._taken % 2], now
            for place, metric in enumerate(METRICS):
                asked.metrics[place].metricId = metric
            pynvml.nvmlGpmMetricsGet(asked)
        except pynvml.NVMLError:
            return None, None
        found = [m.value / 100 if m.nvmlReturn == pynvml.NVML_SUCCESS else None for m in asked.metrics[: len(METRICS)]]
        return found[0], found[1]

    def close(self) -> None:
        for sample in self._samples:
            try:
                pynvml.nvmlGpmSampleFree(sample)
            except pynvml.NVMLError:
                return
