"""Any assignment of blocks to MLPs: each block has an MLP of its own or uses that of an earlier block of its stage.

Several choices give one pattern (block 2 may use the MLP of block 0 or of block 1, which uses that of block 0). Groups are
written in the order of their first blocks, so that equal patterns are one point.
"""


def suggest(trial, model):
    pattern = []
    for rows in model.chains:
        groups = {}
        for place, row in enumerate(rows):
            other = rows[trial.suggest_int(f"mlp{row}", 0, place)]  # itself: an MLP of its own
            groups[row] = groups[other] if other != row else [row]
            if other != row:
                groups[row].append(row)
            else:
                pattern.append(groups[row])
    return [("grouped", {"pattern": pattern})] if any(len(group) > 1 for group in pattern) else []
