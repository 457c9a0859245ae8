"""GPUs through the real pynvml, on a library that answers as NVIDIA's would; and on a real driver where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from midwatch.protocol import Gpu, NodeStats

READ = """
import msgspec, os, sys, threading, time
from pathlib import Path
from launcher.agent import gpus, stats
from midwatch.protocol import RankBeat
gpus.READ_SECONDS, gpus.SELDOM, gpus.STALE_SECONDS, gpus.HANG_SECONDS = 0.1, 2, 1.0, float(sys.argv[3])
reader = stats.NodeReader("here", Path(sys.argv[1]))
beats = (RankBeat(7, os.getpid(), 3, 1.0),)
end, longest = time.monotonic() + float(sys.argv[2]), 0.0
reader.read(beats, 1)
while time.monotonic() < end:
    began = time.monotonic()
    found = reader.read(beats, 1)
    longest = max(longest, time.monotonic() - began)
    time.sleep(0.05)
began = time.monotonic()
reader.close()
alive = [t.name for t in threading.enumerate() if t.name.startswith("gpu")]
sys.stdout.buffer.write(msgspec.msgpack.encode((found, longest, time.monotonic() - began, alive)))
sys.stdout.buffer.flush()
if "child" in globals():
    child.kill()
os._exit(0)  # a thread may hang in the driver
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("a C compiler is missing (tests/apt.txt)")
    made = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(made), str(Path(__file__).parent / "nvml_stub.c")], check=True)
    return made


def _read(
    tmp_path: Path, library: Path | None, seconds: float, hang: float = 60.0, **environment: str
) -> tuple[NodeStats, float, float, list[str]]:
    """The node's figures after so many seconds, the longest that a reading took, closing, and the threads left then."""
    known = {**os.environ, "LD_LIBRARY_PATH": str(library.parent), **environment} if library else {**os.environ}
    script = READ if "NVML_STUB_CHILD" not in environment else CHILD + READ
    command = [sys.executable, "-c", script, str(tmp_path), str(seconds), str(hang)]
    done = subprocess.run(command, env=known, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return msgspec.msgpack.decode(done.stdout, type=tuple[NodeStats, float, float, list[str]])


CHILD = """
import os, subprocess
child = subprocess.Popen(["sleep", "30"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
os.environ["NVML_STUB_PID"] = str(child.pid)
import ctypes
ctypes.CDLL(None).setenv(b"NVML_STUB_PID", str(child.pid).encode(), 1)
"""


@pytest.fixture(scope="module")
def gpus(library: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Gpu, ...]:
    """After two seconds with the eight."""
    stats, longest, closing, alive = _read(tmp_path_factory.mktemp("disk"), library, 2.0, NVML_STUB_CHILD="1")
    assert stats.gpu_note == "" and longest < 0.5
    assert closing < 3 and alive == []
    return stats.gpus


def _faults(gpu: Gpu) -> list[str]:
    return [f"{fault.kind}: {fault.text}" for fault in gpu.faults]


def test_a_sound_gpu_gives_all_its_figures(gpus: tuple[Gpu, ...]) -> None:
    assert [gpu.index for gpu in gpus] == list(range(8))
    gpu = gpus[0]
    assert (gpu.name, gpu.bus, gpu.utilisation, gpu.memory_used) == ("Stub 0", "00000000:10:00.0", 0.0, 1 << 30)
    assert (gpu.temperature, gpu.slowdown, gpu.power, gpu.power_limit) == (40.0, 90.0, 300.0, 700.0)
    assert (gpu.clock, gpu.clock_most, gpu.links, gpu.faults, gpu.stale) == (1755, 1980, (4, 4), (), None)


def test_sm_and_tensor_activity_come_from_gpm_where_there_is_any(gpus: tuple[Gpu, ...]) -> None:
    assert (gpus[0].sm, gpus[0].tensor) == (0.83, 0.415)
    assert (gpus[2].sm, gpus[2].tensor) == (None, None)


def test_a_process_on_a_gpu_is_known_by_its_rank_also_through_a_child(gpus: tuple[Gpu, ...]) -> None:
    (process,) = gpus[0].processes
    assert (process.rank, process.memory) == (7, 1 << 30)


def test_what_a_card_does_not_give_hides_nothing_else(gpus: tuple[Gpu, ...]) -> None:
    assert gpus[2].power is None and gpus[2].power_limit == 700.0 and gpus[2].memory_used == 3 << 30 and not gpus[2].faults


def test_a_lost_gpu_keeps_its_place_and_says_so(gpus: tuple[Gpu, ...]) -> None:
    assert (gpus[4].name, gpus[4].memory_used, gpus[4].temperature) == ("Stub 4", None, None)
    assert _faults(gpus[4]) == ["lost: it is lost: it has fallen off the bus"]
    assert gpus[4].faults[0].time > 1e9


def test_xids_are_told_in_words_the_cards_own_before_a_programs(gpus: tuple[Gpu, ...]) -> None:
    assert _faults(gpus[1]) == [
        "xid: XID 79: it has fallen off the bus",
        "xid: XID 31: a page fault on the GPU, usually a bug in the program",
    ]


def test_heat_is_a_fault_and_the_power_limit_is_none(gpus: tuple[Gpu, ...]) -> None:
    assert _faults(gpus[3]) == ["throttle: slowed down by heat"]


def test_ecc_and_rows_to_remap(gpus: tuple[Gpu, ...]) -> None:
    assert _faults(gpus[5]) == [
        "ecc: 2 uncorrected ECC errors since the driver was loaded",
        "remap: memory rows wait to be remapped: reset it",
    ]


def test_an_nvlink_with_errors_and_one_that_went_down(gpus: tuple[Gpu, ...]) -> None:
    errors, down = sorted(_faults(gpus[6]), reverse=True)
    assert errors.startswith("nvlink: NVLink 3: ") and errors.endswith(" replays") and "," not in errors
    assert down == "nvlink: NVLink 1 is down" and gpus[6].links == (3, 4)


def test_a_gpu_that_hangs_holds_up_nothing_and_is_told_of_as_old(tmp_path: Path, library: Path) -> None:
    stats, longest, closing, alive = _read(tmp_path, library, 2.5, 2.0, NVML_STUB_HANG="3")
    gpu = stats.gpus[7]
    assert longest < 0.5 and closing < 4 and alive == ["gpu-7"]
    assert gpu.stale is not None and 1 < stats.time - gpu.stale < 6
    assert _faults(gpu) == ["hang: the driver does not answer for it"]
    assert stats.gpus[0].utilisation == 0.0 and stats.gpus[0].stale is None and stats.gpus[6].memory_used == 7 << 30


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="this machine has a driver")
def test_without_a_driver_cpus_and_memory_are_shown_and_it_is_said_why(tmp_path: Path) -> None:
    stats, _, closing, alive = _read(tmp_path, None, 0.2)
    assert stats.gpus == () and stats.gpu_note.startswith("no GPU")
    assert len(stats.cpus) == os.cpu_count() and 0 < stats.memory_used < stats.memory_total
    assert stats.disk_free and closing < 1 and alive == []


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/proc/driver/nvidia").exists(), reason="there is no NVIDIA driver")
def test_a_real_gpu_gives_its_figures(tmp_path: Path) -> None:
    stats, longest, _, alive = _read(tmp_path, None, 3.0)
    assert stats.gpus and longest < 0.5 and alive == []
    for gpu in stats.gpus:
        print(msgspec.json.encode(gpu).decode())
        assert gpu.name and gpu.memory_total and gpu.temperature and gpu.stale is None
        assert gpu.sm is not None or not any(hopper in gpu.name for hopper in ("H100", "H200"))
