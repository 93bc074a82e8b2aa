"""A release: its notes, workflows and image, as far as they can be checked without running them."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from release_notes import main, release_notes

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in (ROOT / ".github" / "workflows").glob("*.yml")
}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture
def project(tmp_path):
    """A folder with version 1.2.3 in three files."""
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (tmp_path / "CITATION.cff").write_text("title: x\nversion: 1.2.3\n")
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## Unreleased\n- new\n\n## [1.2.3] - 2026-11-29\n### Added\n- a\n\n"
        "## 1.2.2\n- old\n"
    )
    return tmp_path


def test_notes_are_the_section_of_the_version(project):
    assert release_notes("v1.2.3", project) == "### Added\n- a"


@pytest.mark.parametrize(
    ("tag", "file", "old", "new", "words"),
    [
        ("1.2.3", "CITATION.cff", "", "", "Invalid tag 1.2.3"),
        ("v1.2.4", "CITATION.cff", "", "", "has version 1.2.3: v1.2.3"),
        ("v1.2.3", "CITATION.cff", "1.2.3", "1.2.30", "CITATION.cff has another version"),
        ("v1.2.3", "CHANGELOG.md", "1.2.3", "1.2.4", "no entries below `## 1.2.3`"),
        ("v1.2.3", "CHANGELOG.md", "### Added\n- a\n", "", "no entries below `## 1.2.3`"),
    ],
)
def test_versions_that_differ_are_refused(project, tag, file, old, new, words):
    path = project / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=re.escape(words)):
        release_notes(tag, project)


def test_the_command(capsys):
    assert main(["v0.0.0"]) == 1
    assert VERSION in capsys.readouterr().err
    assert main([]) == 2


def steps(workflow):
    return [step for job in WORKFLOWS[workflow]["jobs"].values() for step in job["steps"]]


def test_workflows_run_what_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for workflow in WORKFLOWS:
        for words in (shlex.split(step["run"]) for step in steps(workflow) if "run" in step):
            if words[0] == "make":
                assert set(words[1:]) <= targets
            files = [word for word in words if word.startswith(("scripts/", ".ci/"))]
            assert all((ROOT / name).is_file() for name in files)


def test_only_the_publishing_job_may_ask_for_a_token_of_pypi():
    workflow = WORKFLOWS["release"]
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
    assert workflow["permissions"] == {}
    allowed = {name: job["permissions"] for name, job in workflow["jobs"].items()}
    assert [name for name, rights in allowed.items() if "id-token" in rights] == ["publish"]
    assert [name for name, rights in allowed.items() if rights.get("contents") == "write"] == [
        "announce"
    ]
    needs = {name: job.get("needs") for name, job in workflow["jobs"].items()}
    assert needs == {"build": None, "publish": "build", "announce": "publish"}
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def test_text_of_others_is_never_part_of_a_command():
    """`${{ }}` in a command would be run by the shell; a tag may hold any text."""
    for workflow in WORKFLOWS:
        for step in steps(workflow):
            assert "${{" not in step.get("run", "")


def instructions():
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


def test_the_image_has_what_pip_needs_and_no_root():
    found = instructions()
    allowed = (ROOT / ".dockerignore").read_text().split()
    copied = [name for kind, text in found if kind == "COPY" for name in text.split()[:-1]]
    assert {"pyproject.toml", "src"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in allowed
    kinds = [kind for kind, _ in found]
    assert kinds.index("USER") > max(i for i, kind in enumerate(kinds) if kind == "RUN")
    assert ("ENTRYPOINT", '["molf"]') in found
    arguments = {text.partition("=")[0] for kind, text in found if kind == "ARG"}
    named = re.findall(r"--build-arg (\w+)=", (ROOT / "Dockerfile").read_text())
    assert arguments == set(named) == {"BASE", "TORCH_INDEX"}
    python = re.search(r"BASE=python:(3\.\d+)", str(found))
    assert python[1] in (ROOT / "requirements-dev.lock").read_text().splitlines()[0]
