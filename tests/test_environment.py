"""Where a measurement was taken: the CPU's name, and code that changed."""

from benchmarks.environment import code_hash, cpu_model, describe_machine


def test_the_cpu_is_named_as_the_system_has_it(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Maker Model: 3\nprocessor\t: 1\nmodel name\t: Maker Model: 3\n"
    )
    assert cpu_model(cpuinfo) == "Maker Model: 3"
    assert cpu_model(tmp_path / "none") == "CPU"


def test_a_description_says_how_many_cores_were_used_only_where_it_is_known():
    assert "cores" not in describe_machine()
    found = describe_machine(2)
    assert found["cores"] == 2
    assert found["machine"].endswith(" cores")
    assert {"python", "torch", "peft"} < set(found["versions"])


def test_code_is_told_by_content_and_by_name_and_nothing_else_counts(tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "llm_merging").mkdir()
    file = tmp_path / "search/a.py"
    file.write_text("x = 1\n")
    first = code_hash(tmp_path)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "search/notes.txt").write_text("words")
    code_hash.cache_clear()
    assert code_hash(tmp_path) == first
    file.rename(tmp_path / "search/b.py")
    code_hash.cache_clear()
    assert code_hash(tmp_path) != first
