package image

import "github.com/paddock-ci/paddock/fleet"

// The indexes of what is a piece like a chunk, and none of the disk's.
const (
	NVRAMIndex  = -1
	ConfigIndex = -2
)

// NVRAMChunk is the NVRAM as a piece to be fetched; its Content is empty if there is none.
func (m *Manifest) NVRAMChunk() Chunk { return m.NVRAM.piece(NVRAMIndex, m.NVRAMLayer) }

// ConfigChunk is the VM config as a piece to be fetched.
func (m *Manifest) ConfigChunk() Chunk { return m.Config.piece(ConfigIndex, m.ConfigLayer) }

// piece is a blob that is its own content.
func (b Blob) piece(index, layer int) Chunk {
	return Chunk{
		Index: index, Layer: layer, Size: b.Size, Content: b.Digest,
		Blob: b.Digest, BlobSize: b.Size, MediaType: b.MediaType,
	}
}

// Pieces is all that a full pull has to fetch: Distinct, the NVRAM if there is one, and
// the VM config.
func (m *Manifest) Pieces() []Chunk {
	pieces := m.Distinct()
	if m.NVRAM.Digest != "" {
		pieces = append(pieces, m.NVRAMChunk())
	}
	return append(pieces, m.ConfigChunk())
}

// Piece is the number by which nodes tell each other of a piece: the Index of the first
// chunk with that content, else len(Chunks) for the NVRAM, and one more for the VM config.
func (m *Manifest) Piece(content fleet.Digest) (n int, ok bool) {
	if content == "" {
		return 0, false
	}
	for i := range m.Chunks {
		if m.Chunks[i].Content == content {
			return i, true
		}
	}
	switch content {
	case m.NVRAM.Digest:
		return len(m.Chunks), true
	case m.Config.Digest:
		return len(m.Chunks) + 1, true
	}
	return 0, false
}

// PieceCount is one more than the highest number of a piece.
func (m *Manifest) PieceCount() int { return len(m.Chunks) + 2 }
