import gc

from verl.utils.heap import freeze_heap


def test_what_exists_is_left_out_of_later_collections():
    frozen = gc.get_freeze_count()
    try:
        freeze_heap()
        assert gc.get_freeze_count() > frozen
        assert len(gc.get_objects()) < 1000
    finally:
        gc.unfreeze()
