"""How long threads of a step spin before they sleep: decoding on a quiet machine, and beside one
busy process.

    python benchmarks/waiting_threads.py [--spins passive,1000,…] [--rounds 5] [--seconds 1]
        [--max-noise 0.1] [--json FILE]

One engine for each variant of `GOMP_SPINCOUNT` (turns of a loop before a waiting thread of libgomp
sleeps; "passive" is OMP_WAIT_POLICY=passive, "ours" what Dovetail sets where the user sets nothing;
libgomp's own is 300000), each in a process of its own, all waiting. They take turns: in each round
each decodes alone on the machine and beside `while True: pass`, one sequence and eight, for about
`--seconds`. Figures are medians over the rounds, in tokens a second, with their ratio to libgomp's
own and of busy to quiet.

Others who use the machine are noise: what they took (in cores, from /proc/stat) is measured with
each figure, and one during which they took more than `--max-noise` is measured again, up to
`--tries` times, after which the quietest counts. Before each figure others are waited for,
`--patience` seconds in all. The JSON has all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from dovetail_bench.machine import in_words, machine

LIBGOMP = "300000"
SPINS = f"passive,1000,3000,10000,30000,100000,{LIBGOMP},1000000,ours"
COUNTS = (1, 8)
NUM_TOKENS = 128
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spins", default=SPINS)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--max-noise", type=float, default=0.1)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--patience", type=float, default=600.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode:
        decode(args.model, args.seconds)
        return
    engines = {spins: Decoder(spins, args.model, args.seconds) for spins in args.spins.split(",")}
    quiet = Quiet(args.max_noise, args.patience)
    figures = [
        measure_quietly(engine, num_sequences, busy, args.tries, quiet, round)
        for round in range(args.rounds)
        for engine in engines.values()
        for busy in (False, True)
        for num_sequences in COUNTS
    ]
    for engine in engines.values():
        engine.close()
    print(
        f"{in_words(machine())}; tokens/s, medians of {args.rounds} rounds (ratio to libgomp's own)"
    )
    table = summary(figures, list(engines))
    print(*(" ".join(f"{cell:>18}" for cell in row) for row in table), sep="\n")
    noise = sorted(f.others for f in figures)
    print(
        f"others took {statistics.median(noise):.2f} cores in the median and {noise[-1]:.2f} at"
        " most"
    )
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "command": "python " + " ".join(sys.argv),
            "model": args.model,
        }
        lines = ",\n  ".join(json.dumps(asdict(f)) for f in figures)  # a line each
        head = json.dumps(
            {"about": about, "table": table}, indent=1, ensure_ascii=False
        ).removesuffix("\n}")
        args.json.write_text(f'{head},\n "figures": [\n  {lines}\n ]\n}}\n')


@dataclass(frozen=True)
class Figure:
    round: int
    spins: str
    busy: bool
    """Beside one busy process."""
    num_sequences: int
    tokens_per_second: float
    own: float
    """Cores that the engine's process took."""
    others: float
    """Cores that neither it nor our busy process took."""


class Decoder:
    """An engine in a process of its own, that decodes when it is told to."""

    def __init__(self, spins: str, model: str, seconds: float) -> None:
        self.spins = spins
        env = {k: v for k, v in os.environ.items() if k not in VARIABLES}
        if spins == "passive":
            env["OMP_WAIT_POLICY"] = "passive"
        elif spins != "ours":
            env["GOMP_SPINCOUNT"] = spins
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--decode", "--model", model, "--seconds", str(seconds)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found

    def run(self, num_sequences: int) -> dict[str, float]:
        """{"tokens", "seconds", "cpu"} of one turn."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{num_sequences}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.communicate()


def measure_quietly(
    engine: Decoder, num_sequences: int, busy: bool, tries: int, quiet: Quiet, round: int
) -> Figure:
    """The first figure with little noise, or the least noisy one."""
    found: list[Figure] = []
    for _ in range(tries):
        quiet.wait()
        found.append(measure(engine, num_sequences, busy, round))
        if found[-1].others <= quiet.max_noise or quiet.patience <= 0:
            break
    best = min(found, key=lambda f: f.others)
    print(
        f"{round} {engine.spins:>8} {'busy ' if busy else 'quiet'} {num_sequences}:"
        f" {best.tokens_per_second:7.0f} tokens/s, {best.own:.2f} cores, others {best.others:.2f}",
        file=sys.stderr,
        flush=True,
    )
    return best


def measure(engine: Decoder, num_sequences: int, busy: bool, round: int) -> Figure:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        time.sleep(0.3 if busy else 0.05)
        before, theirs = busy_seconds(), cpu_of(other)
        began = time.perf_counter()
        done = engine.run(num_sequences)
        elapsed = time.perf_counter() - began
        others = busy_seconds() - before - done["cpu"] - (cpu_of(other) - theirs)
    finally:
        if other is not None:
            other.kill()
            other.wait()
    figures = (done["tokens"] / done["seconds"], done["cpu"] / elapsed, max(0.0, others / elapsed))
    return Figure(round, engine.spins, busy, num_sequences, *(float(f"{x:.4g}") for x in figures))


@dataclass
class Quiet:
    """Waits until others take little, as long as there is patience left, in seconds."""

    max_noise: float
    patience: float

    def wait(self) -> None:
        while self.patience > 0:
            before, began = busy_seconds(), time.monotonic()
            time.sleep(0.2)
            elapsed = time.monotonic() - began
            if (busy_seconds() - before) / elapsed <= self.max_noise:
                return
            self.patience -= elapsed


def busy_seconds() -> float:
    """CPU time that all processes have taken since the start of the machine."""
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def cpu_of(process: subprocess.Popen[bytes] | None) -> float:
    if process is None:
        return 0.0
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def summary(figures: list[Figure], variants: list[str]) -> list[list[str]]:
    columns = [(busy, n) for n in COUNTS for busy in (False, True)]

    def median(spins: str, busy: bool, num_sequences: int) -> float | None:
        found = [
            f.tokens_per_second
            for f in figures
            if (f.spins, f.busy, f.num_sequences) == (spins, busy, num_sequences)
        ]
        return statistics.median(found) if found else None

    rows = [
        [
            "spins",
            *(f"{n} {'busy' if busy else 'quiet'}" for busy, n in columns),
            *(f"{n} quiet ÷ busy" for n in COUNTS),
        ]
    ]
    for spins in variants:
        row = [spins]
        for busy, n in columns:
            value, base = median(spins, busy, n), median(LIBGOMP, busy, n)
            row.append(
                ""
                if value is None
                else f"{value:.0f}" + (f" (× {value / base:.2f})" if base else "")
            )
        for n in COUNTS:
            quiet, busy_rate = median(spins, False, n), median(spins, True, n)
            row.append(f"{quiet / busy_rate:.2f}" if quiet and busy_rate else "")
        rows.append(row)
    return rows


def decode(model: str, seconds: float) -> None:
    """The child: for each line, which is a number of sequences, decode for about `seconds`."""
    from dovetail import LLM, SamplingParams

    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    with LLM(model, device="cpu") as llm:
        llm.generate([[5, 6, 7]] * max(COUNTS), params)
        print("{}", flush=True)
        for line in sys.stdin:
            num_sequences, tokens = int(line), 0
            cpu, began = time.process_time(), time.perf_counter()
            while time.perf_counter() < began + seconds:
                llm.generate([[5, 6, 7, 8 + i] for i in range(num_sequences)], params)
                tokens += num_sequences * NUM_TOKENS
            elapsed = time.perf_counter() - began
            print(
                json.dumps(
                    {"tokens": tokens, "seconds": elapsed, "cpu": time.process_time() - cpu}
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
