/*
 * Reads captured rows in shared memory: maps a part of a segment read-only and says what its bytes add up to.
 *
 *     cc -O2 -Wall -Wextra -o read_segment read_segment.c
 *     ./read_segment NAME OFFSET BYTES
 *
 * NAME and OFFSET are `segment_name` and `offset` of the SharedMemoryRegion that Generate answers, BYTES is
 * `total_bytes` of the CaptureHeader in it (proto/steer/v1/capture.proto). The segment lasts as long as the lease;
 * what is mapped by then stays valid. `node steer.mjs ... --delivery shared --keep` in ../node holds a lease and prints
 * all three.
 *
 * Prints "bytes N sum N fnv1a HEX", the 64-bit FNV-1a hash of the bytes, and ends with 0; ends with 1 and says why if
 * the segment cannot be read, with 2 if the arguments make no sense. Needs Linux and nothing but the C library.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

/* A number of decimal digits only; ends the program for anything else. */
static size_t number(const char *text, const char *what)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end != '\0' || errno != 0) {
        fprintf(stderr, "read_segment: %s is not a number: %s\n", what, text);
        exit(2);
    }
    return value;
}

/* A descriptor of the segment; ends the program for a name that is not a plain file's. */
static int open_segment(const char *name, struct stat *status)
{
    /* O_NONBLOCK: a pipe of that name must not make us wait for a writer. */
    int segment = shm_open(name, O_RDONLY | O_NONBLOCK, 0);
    if (segment < 0 || fstat(segment, status) < 0) {
        fprintf(stderr, "read_segment: cannot open the segment: %s\n", strerror(errno));
        exit(1);
    }
    if (!S_ISREG(status->st_mode)) {
        fprintf(stderr, "read_segment: that is not a segment of shared memory\n");
        exit(1);
    }
    return segment;
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: read_segment NAME OFFSET BYTES\n");
        return 2;
    }
    size_t offset = number(argv[2], "OFFSET"), bytes = number(argv[3], "BYTES");
    struct stat status;
    int segment = open_segment(argv[1], &status);
    size_t size = status.st_size;
    if (bytes == 0 || offset > size || bytes > size - offset) {
        fprintf(stderr, "read_segment: the segment has %zu bytes, not %zu from %zu on\n", size, bytes, offset);
        return 1;
    }

    /* A mapping begins at a page, and rows at a multiple of 64 bytes: the simplest is to map all of it. */
    const unsigned char *memory = mmap(NULL, size, PROT_READ, MAP_SHARED, segment, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "read_segment: cannot map the segment: %s\n", strerror(errno));
        return 1;
    }
    uint64_t sum = 0, hash = UINT64_C(0xcbf29ce484222325);
    for (size_t i = offset; i < offset + bytes; i++) {
        sum += memory[i];
        hash = (hash ^ memory[i]) * UINT64_C(0x100000001b3);
    }
    printf("bytes %zu sum %" PRIu64 " fnv1a %016" PRIx64 "\n", bytes, sum, hash);
    return 0;
}
