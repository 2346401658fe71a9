"""One process at a time, also where the folder of the lock goes meanwhile."""

import threading
import time

from ertacache.utils.files import writable
from ertacache.utils.locks import exclusive


def test_who_waits_for_work_that_fails_and_takes_its_folder_away_goes_on(tmp_path, capsys):
    folder, waits, ended = tmp_path / "a" / "b", threading.Event(), []

    def second():
        waits.set()
        with exclusive(folder / "lock", "making it") as waited:
            ended.append((waited, folder.is_dir()))

    thread = threading.Thread(target=second)
    try:
        with writable(folder), exclusive(folder / "lock", "making it") as waited:
            assert not waited
            thread.start()
            waits.wait(10)
            while "another process is making it: waiting for it" not in capsys.readouterr().err:
                time.sleep(0.01)
            raise KeyError
    except KeyError:
        pass
    thread.join(10)
    assert ended == [(True, True)] and not (folder / "lock").exists()
