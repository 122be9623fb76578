"""What holds for every launch plan, whoever made it."""

from xent_array._engines import cuda


def assert_it_covers(p):
    """Every logit of every row has a thread."""
    size = cuda.DTYPES[p.dtype][1]
    of_a_row = p.cluster or p.parts
    assert (p.blocks // of_a_row) * p.rows_per_block >= p.rows > (p.blocks // of_a_row - 1) * p.rows_per_block
    assert (p.family == "SPLIT") == (p.cluster == 0) == (p.parts > 1)
    if p.family == "SPLIT":
        assert p.stream
        assert p.parts * p.part >= p.classes > (p.parts - 1) * p.part
        assert p.part * size % 16 == 0  # all parts are aligned like the row
        assert p.parts <= cuda.MOST_PARTS
    if p.family in cuda.HOLDING:
        threads = p.lanes or p.threads * p.cluster
        assert threads * p.vectors * 16 >= p.classes * size  # at any alignment, there is room for its vectors
    if p.family == "COLUMNS":
        assert p.stream or p.lanes * p.vectors >= p.classes
        assert p.width * size <= 16
        assert p.threads // 32 % p.lanes == 0  # whole tiles


def assert_it_fits(p):
    """The chip accepts the launch."""
    assert p.threads % 32 == 0
    assert 32 <= p.threads <= p.bound[0] <= 1024
    assert p.bound[0] * p.bound[1] <= (1024 if p.chip == 75 else 2048)
    if p.family == "SPLIT":
        assert p.blocks % p.parts == 0
        return
    assert p.blocks % p.cluster == 0
    assert p.cluster == 1 or (p.chip >= 90 and p.cluster in (2, 4, 8) and p.family in ("BLOCK", "STREAM"))
