"""The quickstart's reward in two parts, for an estimator that takes several."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    answer = solution_str.strip()
    right = sum(a == b for a, b in zip(answer, ground_truth, strict=False))
    return {
        "score": right / len(ground_truth),
        "letters": right / len(ground_truth),
        "length": float(len(answer) == len(ground_truth)),
    }
