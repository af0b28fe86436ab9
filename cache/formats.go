package cache

import (
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/lume"
	"github.com/paddock-ci/paddock/image/tart"
)

// Formats are the image formats that are known, in the order in which they are tried, also
// those that are only known to be refused in plain words.
func Formats() []image.Codec { return []image.Codec{tart.Codec{}, lume.Codec{}} }
