package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
)

// CopyFile makes dst, which must not exist yet, of the bytes of src: how a driver clones
// a file that was given no better way. What a failure leaves of dst is removed.
func CopyFile(ctx context.Context, src, dst string) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Close()); err != nil {
		return errors.Join(fmt.Errorf("copying %s: %w", src, err), os.Remove(dst))
	}
	return nil
}
