"""datatrove's part of `bench.cleaning`, run by the Python of an environment that has it.

    _datatrove.py INPUT OUT TOKENIZER.json WORKERS

Reads a directory of JSON lines, takes away exact and near duplicates, applies the four families of rules, and writes tokens, with
datatrove's own steps at their defaults; exact duplicates by the text without case and white space at its ends, as nothing is
its default. Prints the seconds of each stage, documents and tokens as JSON. It knows nothing of Midwatch.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FILES_A_WORKER = 4


def content(document: Any) -> bytes:  # datatrove looks at what this says it returns
    return " ".join(document.text.casefold().split()).encode()


def main() -> None:
    texts, out, tokenizer, workers = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process a core already
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datatrove.pipeline.dedup.exact_dedup as exact
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.logging import logger

    logger.remove()
    same = exact.ExactDedupConfig(content_getter=content)
    near = minhash.MinhashConfig()

    def reader() -> Any:
        return JsonlReader(texts, glob_pattern="*.jsonl")

    def without_exact() -> list[Any]:
        return [reader(), exact.ExactDedupFilter(f"{out}/exact-found", config=same)]

    signature = minhash.MinhashDedupSignature(f"{out}/signatures", config=near)
    rules = [GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(), FineWebQualityFilter()]
    encode = DocumentTokenizer(f"{out}/tokens", tokenizer_name_or_path=tokenizer, eos_token="[EOS]", shuffle_documents=False)
    files = FILES_A_WORKER * workers
    stages: list[tuple[str, list[Any], int]] = [
        ("exact: signatures", [reader(), exact.ExactDedupSignature(f"{out}/exact", config=same)], files),
        ("exact: finding", [exact.ExactFindDedups(f"{out}/exact", f"{out}/exact-found", config=same)], 1),
        ("near: signatures", [*without_exact(), signature], files),
        ("near: buckets", [minhash.MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=near)], near.num_buckets),
        ("near: clusters", [minhash.MinhashDedupCluster(f"{out}/buckets", f"{out}/remove", config=near)], 1),
        ("rules, encoding", [*without_exact(), minhash.MinhashDedupFilter(f"{out}/remove"), *rules, encode], files),
    ]
    seconds = {}
    for name, pipeline, tasks in stages:
        started = time.perf_counter()
        executor = LocalPipelineExecutor(
            pipeline, tasks=tasks, workers=min(workers, tasks), logging_dir=f"{out}/logs/{len(seconds)}", start_method="fork"
        )
        executor.run()
        seconds[name] = time.perf_counter() - started
    ends = [path.stat().st_size // 8 for path in (out / "tokens").glob("*.index")]
    tokens = sum(path.stat().st_size // 2 for path in (out / "tokens").glob("*.ds"))
    print(json.dumps({"seconds": seconds, "documents": sum(ends), "tokens": tokens}))


if __name__ == "__main__":
    main()
