from model_table import QUANTIZATIONS, Outcome, outcomes_of, text_of


def test_a_document_gives_back_the_outcomes_that_it_was_written_from():
    by_name = {
        "Qwen3": [Outcome(True, "yes", packed=True)] * 3,
        "Gemma2": [
            Outcome(True, "yes", packed=False),
            Outcome(False, "stops", "a reason"),
            Outcome(False, "hangs", "b"),
        ],
        "GptOss": [Outcome(False, "refused", "path: it is not supported; use another")] * 3,
        "Glm4": [Outcome(True, "yes", packed=True)] * 2 + [Outcome(False, "refused", "a reason")],
    }
    outcomes = {(name, q): row[i] for name, row in by_name.items() for i, q in enumerate(QUANTIZATIONS)}
    text = f"1. a list\n\n| `other` | table |\n<!-- models -->\n{text_of(outcomes)}\n<!-- /models -->\n2. more\n"
    assert outcomes_of(text) == outcomes
