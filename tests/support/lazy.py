"""Results of libraries that compute when asked."""


def computed(result):
    """A result with everything in it computed; others unchanged."""
    if isinstance(result, tuple):
        return tuple(map(computed, result))
    return result.compute(scheduler="synchronous") if hasattr(result, "compute") else result
