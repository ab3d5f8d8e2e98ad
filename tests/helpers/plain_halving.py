"""Asynchronous successive halving written from the paper, with nothing sorted ahead or kept."""

from __future__ import annotations


def plain_halving(curves: list[list[float]], steps: list[int], factor: int) -> tuple[list[int], int]:
    """Run it with one worker; returns the steps that each parameter set makes, and how many run to their end."""
    made, rungs, promoted = [0] * len(curves), [[] for _ in steps], [set() for _ in steps]
    ended: list[int] = []
    ends = [*steps, len(curves[0])]
    new = 0
    while True:
        job = None
        for rung in range(len(steps) - 1, -1, -1):
            top = sorted(rungs[rung], key=lambda p: (-curves[p][steps[rung] - 1], p))[: len(rungs[rung]) // factor]
            job = next(((p, rung + 1) for p in top if p not in promoted[rung]), None)
            if job:
                promoted[rung].add(job[0])
                break
        if job is None and new < len(curves):
            job, new = (new, 0), new + 1
        if job is None:
            return made, len(ended)
        point, level = job
        made[point] = ends[level]
        if level < len(steps):
            rungs[level].append(point)
        else:
            ended.append(point)
