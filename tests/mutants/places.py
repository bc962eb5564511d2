"""Mutants of the folders and the shared memory with which a server starts."""

from tests.mutants.mutant import Mutant, tests_in

PLACES = (
    Mutant(
        name="a cache that others can write to is used",
        file="steer_service/core/cache_folder.py",
        old="    if status.st_mode & stat.S_IWOTH:\n",
        new="    if False:\n",
        why="another user of the host puts code into the cache, and the server runs it",
        killed_by=(
            *tests_in("core/test_cache_folder.py", "test_a_folder_that_others_can_write_to_is_refused"),
            *tests_in("ops/test_kernel_cache.py", "test_a_folder_that_others_can_write_to_is_neither_read_nor_written"),
        ),
    ),
    Mutant(
        name="a cache of another user is used",
        file="steer_service/core/cache_folder.py",
        old="    if status.st_uid != os.geteuid():\n",
        new="    if False:\n",
        why="a server runs code that another user has put into the cache",
        killed_by=tests_in("core/test_cache_folder.py", "test_a_folder_of_another_user_is_refused"),
    ),
    Mutant(
        name="a cache is made for all users",
        file="steer_service/core/cache_folder.py",
        old="folder.mkdir(mode=0o700,",
        new="folder.mkdir(",
        why="with a umask of 000, other users can write to the cache of the next start",
        killed_by=tests_in("core/test_cache_folder.py", "test_only_this_user_may_enter_a_folder_that_is_made"),
    ),
    Mutant(
        name="a full disk is taken for a cache",
        file="steer_service/core/cache_folder.py",
        old=" or _why_full(folder, least_bytes)",
        new="",
        why="the engine dies while it writes what it has compiled",
        killed_by=tests_in("core/test_cache_folder.py", "test_a_read_only_or_full_file_system_is_named"),
    ),
    Mutant(
        name="a damaged cache of the kernel is kept",
        file="steer_service/ops/kernel_cache.py",
        old="            path.unlink()\n",
        new="            pass\n",
        why="the server dies at each start until somebody finds the file",
        killed_by=tests_in("ops/test_kernel_cache.py", "test_a_damaged_file_is_compiled_again_and_replaced"),
    ),
    Mutant(
        name="the kernel of other sources is used",
        file="steer_service/ops/kernel_cache.py",
        old="        digest.update(Path(module.__file__).read_bytes())\n",
        new="",
        why="after an update the old kernel steers, if file sizes and times are the same",
        killed_by=tests_in("ops/test_kernel_cache.py", "test_other_sources_have_another_folder"),
    ),
    Mutant(
        name="rings keep vLLM's sizes in a small /dev/shm",
        file="steer_service/shm/message_rings.py",
        old="    return own if fits else Rings(",
        new="    return own if True else Rings(",
        why="a container with 64 MiB of shared memory does not start",
        killed_by=(
            *tests_in("shm/test_message_rings.py", "test_64_mib_of_a_container_are_enough_and_16_are_not"),
            *tests_in("engine/test_start_room.py", "test_rings_become_small_where_dev_shm_is"),
        ),
    ),
    Mutant(
        name="an engine starts in a /dev/shm that is too small",
        file="steer_service/engine/start.py",
        old="    if problem:\n        raise EngineFailed(problem",
        new="    if False:\n        raise EngineFailed(problem",
        why="vLLM fails after minutes, or a process ends with SIGBUS",
        killed_by=tests_in("engine/test_start_room.py", "test_too_little_room_is_one_sentence_with_both_numbers"),
    ),
    Mutant(
        name="captures take the memory of vLLM's rings",
        file="steer_service/shm/pool.py",
        old="min(left, free - self.kept_free())",
        new="min(left, free)",
        why="the next message of vLLM ends a process with SIGBUS",
        killed_by=tests_in("shm/test_pool.py", "test_segments_leave_what_others_will_write_to_the_file_system"),
    ),
)
