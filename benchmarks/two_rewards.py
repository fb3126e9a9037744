"""Reward function of the quickstart with two components, for estimators that use several rewards."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    answer = solution_str.strip()
    right = sum(a == b for a, b in zip(answer, ground_truth, strict=False))
    return {
        "score": right / len(ground_truth),
        "letters": right / len(ground_truth),
        "length": float(len(answer) == len(ground_truth)),
    }
