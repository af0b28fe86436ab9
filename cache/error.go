package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// Errors that callers decide on.
var (
	// ErrLeased: the image is in use (leased or being pulled), so it cannot be evicted.
	ErrLeased = errors.New("the image is in use")
	// ErrNotReady: the image is not here in full.
	ErrNotReady = errors.New("the image is not ready here; pull it first")
	// ErrInUse: another process has the store open.
	ErrInUse = errors.New("the image store is in use by another process")
)

// Class is a kind of failure, by whom or what can mend it.
type Class string

// The classes.
const (
	ClassAuth     Class = "auth"      // credentials are missing, wrong or not enough
	ClassNotFound Class = "not-found" // no such repository, tag, manifest or blob
	ClassNetwork  Class = "network"   // the registry cannot be reached, stalls or is overloaded
	ClassDisk     Class = "disk"      // this node's disk is full or broken
	ClassDigest   Class = "digest"    // bytes came that are not what was asked for
	ClassFormat   Class = "format"    // the image is as published, and no good
)

// Error is a failed pull.
type Error struct {
	Class Class
	Image fleet.Digest // empty: not known yet
	// RetryAt is when to try again. Of a source: it wants to be left alone until then; zero:
	// it did not say. Of Pull: before that it gives this same error again.
	RetryAt time.Time
	Err     error
}

func (e *Error) Error() string {
	if e.Image == "" {
		return e.Err.Error()
	}
	return fmt.Sprintf("pulling image %s: %v", e.Image.Short(), e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// ClassOf finds the class of whatever went wrong in a pull.
func ClassOf(err error) Class {
	var known *Error
	var stream *tart.DecodeError
	var path *fs.PathError
	var link *os.LinkError
	var errno *os.SyscallError
	switch {
	case errors.As(err, &known):
		return known.Class
	case errors.As(err, &stream), isFormat(err):
		return ClassFormat
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG), errors.Is(err, syscall.EIO):
		return ClassDisk
	case errors.As(err, &path), errors.As(err, &link), errors.As(err, &errno):
		return ClassDisk
	default:
		return ClassNetwork
	}
}

// retryMost bounds how long a source may want to be left alone.
const retryMost = time.Hour

// retryAt is when whoever failed wants to be asked again; of several, the first that does.
// Zero: none said.
func retryAt(err error) (at time.Time) {
	switch e := err.(type) { //nolint:errorlint // it walks the whole tree itself
	case *Error:
		if !e.RetryAt.IsZero() {
			if most := time.Now().Add(retryMost); e.RetryAt.After(most) {
				return most
			}
			return e.RetryAt
		}
		return retryAt(e.Err)
	case interface{ Unwrap() []error }:
		for _, one := range e.Unwrap() {
			if t := retryAt(one); !t.IsZero() && (at.IsZero() || t.Before(at)) {
				at = t
			}
		}
		return at
	case interface{ Unwrap() error }:
		return retryAt(e.Unwrap())
	}
	return time.Time{}
}

// isFormat reports whether err is one of package image's.
func isFormat(err error) bool {
	for _, target := range []error{
		image.ErrMalformed, image.ErrTooLarge, image.ErrSizeMismatch, image.ErrMissingAnnotation,
		image.ErrDoubled, image.ErrMissingLayer, image.ErrUnknownMediaType, image.ErrIndex,
		image.ErrStacked, image.ErrASIF, image.ErrLegacyDisk,
	} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// diskError marks an error of this node's disk, with a hint if it is full.
func diskError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		err = fmt.Errorf("%w; evict images or give the store more room: what was fetched is kept", err)
	}
	return &Error{Class: ClassDisk, Err: err}
}

// cancelled reports whether err is only that the caller's context ended.
func cancelled(ctx context.Context, err error) bool { return err != nil && ctx.Err() != nil }
