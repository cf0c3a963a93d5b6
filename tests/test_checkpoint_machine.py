"""R16 at a small size: random histories of saves, kills, damage, retention and resharding. See the machine."""

from tests.reliability.machine import run_machine


def test_no_acknowledged_save_is_lost_in_any_history():
    run_machine(20, 12)
