"""Parts of the GPU bench, one module each; `gpu.py` beside this folder runs them, each in a process of its own.

    part        what parts, items and settings are           child        runs a part's items, in the process
    runner      starts children, watches them, keeps rows    facts        machine, versions, sources
    timing      medians on events, interleaved; CUDA graphs  torch_roads  plain torch, to compare with
    packed      random packed weights, in float64 too        formats      the packed formats that are timed
    forced      one configuration at a time, and what ran    check_cases  what the part "check" checks
    goals       the issue's goals against the rows           report       gpu.md

Nothing here needs more than torch, Triton, transformers and numpy.
"""

NAMES = ("machine", "check", "search", "linear", "compress", "model")
