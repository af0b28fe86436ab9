// Package peer moves pieces of images between the nodes of a site: a server that gives
// what a node's image store has verified, straight from its disk.img, and a client whose
// sources (cache.Source) fetch from such servers.
//
// It decides neither who has what nor who may have it: the controller says so, with an
// address, the hash of a certificate and a token for each peer (access.PeerGrant). It
// verifies no content (cache does, always) and resumes nothing: an error goes to the
// store, which goes on at the byte with another peer. Built by cmd and run by node.
//
// A guest of any node can dial the port, so it takes nothing on trust. The protocol is
// HTTP/1.1 in TLS 1.3, a connection for each stream:
//
//	GET /v1/images/<digest>/manifest          the manifest, byte for byte
//	GET /v1/images/<digest>/pieces/<content>  a piece, by the digest of its content
//	Authorization: Bearer pdkpeer_…           a grant for this server and image; without: 401
//	Range: bytes=N-                           of the content, from byte N to its end
//	Paddock-Encoding: apple-lz4               asked: the rest as an Apple-LZ4 stream; the
//	                                          answer has it if the server had a core to spare
//
// Both sides show the node's self-made certificate. The server's is known by its hash from
// the controller, and a grant names the hash of the receiver's.
package peer

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
)

// EncodingHeader asks for, and announces, an encoding of the content.
const EncodingHeader = "Paddock-Encoding"

// appleLZ4 is the one encoding: independent 64 KiB blocks, from the byte asked for on.
const appleLZ4 = "apple-lz4"

// bearer is how a token is shown.
const bearer = "Bearer "

const (
	imagesPath   = "/v1/images/"
	manifestPath = "/manifest"
	piecesPath   = "/pieces/"
)

// target is what a request is about.
type target struct {
	image   fleet.Digest
	content fleet.Digest // of a piece; empty: the manifest
}

// path is the URL's path of a target.
func (t target) path() string {
	if t.content == "" {
		return imagesPath + string(t.image) + manifestPath
	}
	return imagesPath + string(t.image) + piecesPath + string(t.content)
}

// parseTarget reads a URL's path. There is one spelling of each target, and nothing of a
// path but two digests ever gets near a file's name.
func parseTarget(path string) (target, bool) {
	rest, ok := strings.CutPrefix(path, imagesPath)
	if !ok {
		return target{}, false
	}
	image, rest, ok := strings.Cut(rest, "/")
	if !ok || fleet.CheckDigest(fleet.Digest(image)) != nil {
		return target{}, false
	}
	t := target{image: fleet.Digest(image)}
	if "/"+rest == manifestPath {
		return t, true
	}
	content, ok := strings.CutPrefix("/"+rest, piecesPath)
	if !ok || fleet.CheckDigest(fleet.Digest(content)) != nil {
		return target{}, false
	}
	t.content = fleet.Digest(content)
	return t, true
}

// parseRange reads a Range header of the one form there is, "bytes=N-"; none: from 0 on.
func parseRange(h http.Header) (from int64, ok bool) {
	values := h.Values("Range")
	if len(values) == 0 {
		return 0, true
	}
	text, prefixed := strings.CutPrefix(values[0], "bytes=")
	text, open := strings.CutSuffix(text, "-")
	if len(values) > 1 || !prefixed || !open || text == "" || strings.Trim(text, "0123456789") != "" {
		return 0, false
	}
	from, err := strconv.ParseInt(text, 10, 64)
	return from, err == nil
}

// contentRange is what an answer from a byte on says of itself.
func contentRange(from, size int64) string {
	return fmt.Sprintf("bytes %d-%d/%d", from, size-1, size)
}

// parseToken takes the token from a request; "" if there is none, or more than one.
func parseToken(h http.Header) string {
	values := h.Values("Authorization")
	if len(values) != 1 {
		return ""
	}
	token, ok := strings.CutPrefix(values[0], bearer)
	if !ok {
		return ""
	}
	return token
}
