package image

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"

	"github.com/paddock-ci/paddock/fleet"
)

// Reference names an image at a registry: host[:port]/repository, and a tag, a digest or
// both. The zero value names nothing; make one with ParseReference.
type Reference struct {
	repository name.Repository
	tag        string
	digest     fleet.Digest
}

// repositoryPattern is OCI's own rule (distribution-spec v1.1), which is stricter than
// go-containerregistry's: no empty component, no "..".
var repositoryPattern = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)

// tagPattern is OCI's rule as well; go-containerregistry takes "..", which is a way upwards
// in a URL.
var tagPattern = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)

// hostPattern is a DNS name, an IPv4 or a bracketed IPv6 address, with or without a port.
var hostPattern = regexp.MustCompile(`^([a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(:[0-9]+)?$`)

// maxReference bounds a reference, in bytes: host and repository have at most 255 each by
// their own rules, a tag 128, a digest 71.
const maxReference = 1 << 10

// ParseReference reads "host[:port]/repository[:tag][@sha256:…]". The host must be
// there, since a fleet that guesses a registry pulls from the wrong one; a missing tag
// is "latest". With a digest, the tag is only for people.
func ParseReference(s string) (Reference, error) {
	const hint = "write host/repository:tag or host/repository@sha256:…"
	if len(s) > maxReference {
		return Reference{}, fmt.Errorf("%w of %d bytes; %s", ErrReference, len(s), hint)
	}
	rest, digest, pinned := strings.Cut(s, "@")
	if pinned {
		if err := fleet.CheckDigest(fleet.Digest(digest)); err != nil {
			return Reference{}, fmt.Errorf("%w %q: %w; %s", ErrReference, s, err, hint)
		}
	}
	host, path, slash := strings.Cut(rest, "/")
	if !slash || !hostPattern.MatchString(host) || !strings.ContainsAny(host, ".:") && host != "localhost" {
		return Reference{}, fmt.Errorf("%w %q: it names no registry host; %s", ErrReference, s, hint)
	}
	tag, err := name.NewTag(rest, name.WeakValidation)
	if err != nil {
		return Reference{}, fmt.Errorf("%w %q: %w; %s", ErrReference, s, err, hint)
	}
	if !repositoryPattern.MatchString(tag.Context().RepositoryStr()) {
		return Reference{}, fmt.Errorf("%w %q: repository %q is not one; %s", ErrReference, s, tag.Context().RepositoryStr(), hint)
	}
	if !tagPattern.MatchString(tag.TagStr()) {
		return Reference{}, fmt.Errorf("%w %q: tag %q is not one; %s", ErrReference, s, tag.TagStr(), hint)
	}
	r := Reference{repository: tag.Context(), tag: tag.TagStr(), digest: fleet.Digest(digest)}
	if pinned && !strings.Contains(path, ":") {
		r.tag = ""
	}
	return r, nil
}

// Repository is what go-containerregistry needs to know where to ask.
func (r Reference) Repository() name.Repository { return r.repository }

// Host is the registry with its port, if one is given.
func (r Reference) Host() string { return r.repository.RegistryStr() }

// Tag is the tag; empty if only a digest was given.
func (r Reference) Tag() string { return r.tag }

// Digest is the digest; empty if only a tag was given.
func (r Reference) Digest() fleet.Digest { return r.digest }

// Identifier is what a manifest is asked for by: the digest if there is one, else the tag.
func (r Reference) Identifier() string {
	if r.digest != "" {
		return string(r.digest)
	}
	return r.tag
}

// At is the same repository at a digest.
func (r Reference) At(d fleet.Digest) Reference {
	r.tag, r.digest = "", d
	return r
}

// String gives the reference back in full.
func (r Reference) String() string {
	s := r.repository.Name()
	if r.tag != "" {
		s += ":" + r.tag
	}
	if r.digest != "" {
		s += "@" + string(r.digest)
	}
	return s
}

// Loopback reports whether a host[:port] is this very machine, the only place that is
// spoken to in plain HTTP.
func Loopback(hostport string) bool {
	host := hostport
	if i := strings.LastIndexByte(hostport, ':'); i >= 0 && !strings.HasSuffix(hostport, "]") {
		host = hostport[:i]
	}
	// An error leaves the zero address, which is no loopback.
	address, _ := netip.ParseAddr(strings.Trim(host, "[]"))
	return host == "localhost" || address.IsLoopback()
}
