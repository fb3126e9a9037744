import gc

from verl.utils.heap import freeze_heap


def test_existing_objects_are_excluded_from_later_collections():
    frozen = gc.get_freeze_count()
    try:
        freeze_heap()
        assert gc.get_freeze_count() > frozen
        assert len(gc.get_objects()) < 1000
    finally:
        gc.unfreeze()
