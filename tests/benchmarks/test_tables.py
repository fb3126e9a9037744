import pytest
import tables


def test_columns_are_aligned():
    text = tables.markdown(["a", "longer"], [["1", "2"], ["333", "4"]])
    assert text.splitlines() == ["| a   | longer |", "|-----|--------|", "| 1   | 2      |", "| 333 | 4      |"]


def test_a_section_is_replaced_and_the_rest_is_unchanged(tmp_path):
    document = tmp_path / "d.md"
    document.write_text("before\n<!-- one -->\nold\n<!-- /one -->\nafter\n")
    tables.write_section(document, "one", "new\n")
    assert document.read_text() == "before\n<!-- one -->\nnew\n<!-- /one -->\nafter\n"


def test_a_document_without_the_section_is_an_error_and_unchanged(tmp_path):
    document = tmp_path / "d.md"
    document.write_text("text\n")
    with pytest.raises(ValueError, match="<!-- one -->"):
        tables.write_section(document, "one", "new")
    assert document.read_text() == "text\n"
