/* The reference for fuse_read.py: one file, served by libfuse's own single-threaded loop over pread.
 *
 * It is what a FUSE daemon costs when it does nothing but read a local file: no lookup table, no presence, no
 * checksums.  Usage: fuse_pread FILE MOUNTPOINT; the file appears as MOUNTPOINT/image.  Ends on SIGTERM.
 */
#define FUSE_USE_VERSION 34
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define IMAGE_INODE 2
#define READ_BYTES_MAX (1 << 20)

static int image_fd;
static struct stat image_stat;
static char *buffer;

static void on_init(void *data, struct fuse_conn_info *conn)
{
    (void)data;
    /* libfuse's 0 means the kernel's 12, fewer than the 16 reads of the depth-16 measurement: lazyimg raises it
     * too, and the comparison is of the daemons, not of this limit. */
    conn->max_background = 512;
    conn->congestion_threshold = 512;
}

static int fill_stat(fuse_ino_t inode, struct stat *out)
{
    memset(out, 0, sizeof *out);
    out->st_ino = inode;
    if (inode == FUSE_ROOT_ID) {
        out->st_mode = S_IFDIR | 0755;
        out->st_nlink = 2;
        return 0;
    }
    if (inode != IMAGE_INODE)
        return ENOENT;
    out->st_mode = S_IFREG | 0444;
    out->st_nlink = 1;
    out->st_size = image_stat.st_size;
    out->st_blocks = image_stat.st_blocks;
    return 0;
}

static void on_getattr(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *fi)
{
    (void)fi;
    struct stat attr;
    int error = fill_stat(inode, &attr);
    if (error)
        fuse_reply_err(req, error);
    else
        fuse_reply_attr(req, &attr, 3600.0);
}

static void on_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    if (parent != FUSE_ROOT_ID || strcmp(name, "image") != 0) {
        fuse_reply_err(req, ENOENT);
        return;
    }
    struct fuse_entry_param entry = {.ino = IMAGE_INODE, .attr_timeout = 3600.0, .entry_timeout = 3600.0};
    fill_stat(IMAGE_INODE, &entry.attr);
    fuse_reply_entry(req, &entry);
}

static void on_open(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *fi)
{
    if (inode != IMAGE_INODE) {
        fuse_reply_err(req, EISDIR);
        return;
    }
    fi->keep_cache = 1;
    fuse_reply_open(req, fi);
}

static void on_read(fuse_req_t req, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *fi)
{
    (void)inode;
    (void)fi;
    if (size > READ_BYTES_MAX)
        size = READ_BYTES_MAX;
    ssize_t got = pread(image_fd, buffer, size, offset);
    if (got < 0)
        fuse_reply_err(req, errno);
    else
        fuse_reply_buf(req, buffer, (size_t)got);
}

static const struct fuse_lowlevel_ops operations = {
    .init = on_init, .lookup = on_lookup, .getattr = on_getattr, .open = on_open, .read = on_read,
};

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: %s FILE MOUNTPOINT\n", argv[0]);
        return 2;
    }
    image_fd = open(argv[1], O_RDONLY | O_CLOEXEC);
    if (image_fd < 0 || fstat(image_fd, &image_stat) < 0) {
        perror(argv[1]);
        return 1;
    }
    if (posix_memalign((void **)&buffer, 4096, READ_BYTES_MAX) != 0)
        return 1;
    char *fuse_argv[] = {argv[0], "-o", "fsname=fuse_pread"};
    struct fuse_args args = FUSE_ARGS_INIT(3, fuse_argv);
    struct fuse_session *session = fuse_session_new(&args, &operations, sizeof operations, NULL);
    if (!session)
        return 1;
    int failed = 1;
    if (fuse_set_signal_handlers(session) == 0 && fuse_session_mount(session, argv[2]) == 0) {
        failed = fuse_session_loop(session) < 0;
        fuse_session_unmount(session);
    }
    fuse_session_destroy(session);
    return failed;
}
