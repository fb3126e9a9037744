r"""Write train.parquet and test.parquet from MATH (DigitalLearningGmbH/MATH-lighteval), with answers in \boxed{}.

python3 examples/data_preprocess/math_dataset.py                                    # downloads from the hub
python3 examples/data_preprocess/math_dataset.py --local_dataset_path ~/raw/math    # files train* and test*
"""

import re
import sys
from typing import Any

from verl.utils.dataset.prepare import convert, make_parser, make_row, published_files, text_of, write_splits
from verl.utils.reward_score.text import last_boxed

SOURCE = "DigitalLearningGmbH/MATH-lighteval"
INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
SPLITS = {"train": ("train",), "test": ("test",)}
# A few solutions write `\boxed 12$` without braces.
_BARE = re.compile(r"\\boxed\s+([^${}]+?)\s*(?:\$|$)")


def answer_of(solution: str) -> str | None:
    r"""Return the content of the last `\boxed` (or `\fbox`) of a solution; None without one."""
    text = solution.replace("\\fbox", "\\boxed")
    bare = _BARE.findall(text)
    return last_boxed(text) or (bare[-1] if bare else None)


def row(example: dict[str, Any], split: str, index: int) -> dict[str, Any]:
    """Convert a published row {problem, solution, level, type} to verl's columns."""
    problem, solution = text_of(example, "problem"), text_of(example, "solution")
    answer = answer_of(solution)
    if answer is None:
        raise ValueError(f"'solution' has no \\boxed{{...}}: ...{solution[-60:]!r}")
    info = {"split": split, "index": index}
    return make_row(f"{problem} {INSTRUCTION}", answer, data_source=SOURCE, ability="math", extra_info=info)


def main(arguments: list[str] | None = None) -> None:
    given = make_parser(__doc__, "~/data/math").parse_args(arguments)
    try:
        files = published_files(given.local_dataset_path, SOURCE, folder="data", splits=SPLITS)
        made = {
            split: convert(paths, lambda example, index, split=split: row(example, split, index))
            for split, paths in files.items()
        }
        write_splits(given.local_save_dir, made)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        sys.exit(f"math_dataset.py: {error}")


if __name__ == "__main__":
    main()
