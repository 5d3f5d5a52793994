"""The claims of the Minitron papers, repeated on small models and real text: one command, resumable one arm at a time.

    python benchmarks/claims.py --data FOLDER [--suite toy smollm2] [--seeds 0 1 2] [--arms 'width/*'] [--work runs/claims] [--out docs/benchmarks]
    python benchmarks/claims.py --data FOLDER --list     # what is done and what is not
    python benchmarks/claims.py --data FOLDER --page     # only write the page from what is done

FOLDER holds one ``*.train.jsonl`` and one ``*.validation.jsonl`` (also .gz .xz .zst) of rows with ``text``; without ``--data`` the
variable MINITRON_CLAIMS_TEXT names it. Results lie in the work folder, a file for each arm and seed; an arm that is there is not run
again, one that was killed is. The page is ``<out>/claims.md`` with its pictures beside it, the figures are ``<out>/<machine>/claims.json``.
"""

from __future__ import annotations

import argparse
import fnmatch
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from minitron import host  # noqa: E402

host.prepare()  # the settings under which minitron itself runs, and before torch is loaded

import torch  # noqa: E402
from paper_claims.arms import arms_of  # noqa: E402
from paper_claims.page import write_page  # noqa: E402
from paper_claims.running import Bench  # noqa: E402
from paper_claims.suites import SUITES  # noqa: E402
from paper_claims.teachers import Laboratory  # noqa: E402
from paper_claims.texts import text_files  # noqa: E402

from minitron import log  # noqa: E402
from minitron.errors import ConfigError, MinitronError, nearest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the text")
    parser.add_argument("--suite", nargs="*", default=list(SUITES), help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--seeds", type=int, nargs="*", help="only these seeds")
    parser.add_argument("--arms", nargs="*", default=["*"], help="only arms whose names match one of these patterns")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "claims")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="say what is done, run nothing")
    parser.add_argument("--page", action="store_true", help="write the page, run nothing")
    return parser.parse_args()


def main() -> int:
    """Run what is asked for and not done, then write page and figures."""
    options = arguments()
    log.setup()
    logging.getLogger("paper_claims").handlers = logging.getLogger("minitron").handlers
    logging.getLogger("paper_claims").setLevel(logging.INFO)
    torch.set_num_threads(options.threads)
    host.keep_freed_memory()
    try:
        for name in options.suite:
            if name not in SUITES:
                raise ConfigError(f"--suite {name} is unknown; {nearest(name, SUITES)}")
        files = text_files(options.data)
        benches = {name: Bench(Laboratory(SUITES[name], files, options.work)) for name in SUITES}
        for name in options.suite:
            arms = [arm for arm in arms_of(SUITES[name]) if any(fnmatch.fnmatch(arm.name, pattern) for pattern in options.arms)]
            if options.list:
                _list(benches[name])
            elif not options.page:
                benches[name].run(arms, seeds=options.seeds)
        if not options.list:
            write_page(benches, options.out, threads=options.threads)
    except MinitronError as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2
    return 0


def _list(bench: Bench) -> None:
    for arm in arms_of(bench.lab.suite):
        for seed in arm.seeds:
            result = bench.result(arm, seed)
            print(f"{bench.lab.suite.name:8} {arm.name:28} seed {seed}  " + (f"{result.loss:.4f}  {result.seconds:.0f} s" if result else "not done"))


if __name__ == "__main__":
    sys.exit(main())
