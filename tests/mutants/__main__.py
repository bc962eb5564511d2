"""Prints the verdict on each mutant of the table; fails if one is not killed.

python -m tests.mutants            all
python -m tests.mutants NAME...    those whose name has one of these texts
"""

import sys

from tests.mutants.runner import Outcome, Verdict, check_imports, copied_tree, judged, outcomes_of
from tests.mutants.table import MUTANTS


def main(texts: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not texts or any(text in mutant.name for text in texts)]
    if not chosen:
        print("no mutant has such a name; there are", *[f"  {mutant.name}" for mutant in MUTANTS], sep="\n")
        return 2
    with copied_tree() as tree:
        check_imports(tree)
        tests = list(dict.fromkeys(test for mutant in chosen for test in mutant.killed_by))
        print(f"{len(tests)} tests without a mutant ...", flush=True)
        failed = [test for test, outcome in outcomes_of(tests, tree).items() if outcome is not Outcome.PASSED]
        if failed:
            print("not passed:", *failed, sep="\n  ")
            return 1
        killed = 0
        for mutant in chosen:
            result = judged(mutant, tree)
            killed += result.verdict is Verdict.KILLED
            print(f"{result.verdict:8}  {mutant.name}  ({len(mutant.killed_by)} tests, {result.took_s:.1f} s)")
            for test, outcome in result.outcomes.items():
                if outcome is not Outcome.FAILED:
                    print(f"          {outcome}: {test}")
            sys.stdout.flush()
    print(f"killed {killed} of {len(chosen)}")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
