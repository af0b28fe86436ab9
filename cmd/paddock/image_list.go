package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// imageRow is an image of a store, as lists and scripts see it.
type imageRow struct {
	Ref       string       `json:"ref,omitempty"`
	Digest    fleet.Digest `json:"digest"`
	State     string       `json:"state"` // ready, partial or broken
	Done      int64        `json:"done"`  // bytes on the wire that are here
	Total     int64        `json:"total"` // bytes on the wire of all; 0: not known
	DiskBytes int64        `json:"disk_bytes"`
	UsedAt    time.Time    `json:"used_at,omitzero"`
	Leases    []string     `json:"leases,omitempty"` // who holds it
	Dir       string       `json:"dir"`
	Disk      string       `json:"disk,omitempty"` // the path of a ready image's disk
	Error     string       `json:"error,omitempty"`
}

func rowOf(i cache.Seen) imageRow {
	r := imageRow{
		Ref: i.Ref, Digest: i.Digest, State: stateOf(i), Done: i.Done, DiskBytes: i.DiskBytes,
		UsedAt: i.UsedAt, Leases: i.Leases, Dir: i.Dir,
	}
	if i.Manifest != nil {
		r.Total = i.Manifest.Bytes()
	}
	if i.Ready && i.Err == nil {
		r.Disk = filepath.Join(i.Dir, vm.DiskFile)
	}
	if i.Err != nil {
		r.Error = i.Err.Error()
	}
	return r
}

// state is with how much of a partial image is here.
func (r imageRow) state() string {
	if r.State == "partial" && r.Total > 0 {
		return fmt.Sprintf("partial %d%%", 100*r.Done/r.Total)
	}
	return r.State
}

var storedColumns = []column[imageRow]{
	{"REF", false, func(r imageRow) string { return plainRef(r.Ref) }},
	{"DIGEST", false, func(r imageRow) string { return r.Digest.Short() }},
	{"STATE", false, imageRow.state},
	{"DISK", false, func(r imageRow) string { return size(r.DiskBytes) }},
	{"WIRE", true, func(r imageRow) string { return size(r.Total) }},
	{"USED", false, func(r imageRow) string { return ago(r.UsedAt) }},
	{"LEASES", false, func(r imageRow) string { return strings.Join(r.Leases, ", ") }},
	{"PATH", true, func(r imageRow) string { return r.Dir }},
	{"ERROR", true, func(r imageRow) string { return r.Error }},
}

func imageListCommand(g *globals) *cobra.Command {
	var store storeFlag
	cmd := &cobra.Command{
		Use: "list", Short: "List the images of a store", Args: cobra.NoArgs,
		Long: `List the images of a store, with those that are here in part, and how much of them is. DISK is
what an image's files occupy, USED when it was last pulled or leased, LEASES who holds it: a VM, or a peer that
is served. -o wide adds the bytes that a pull moves, where the files are, and what is wrong.

` + aboutStore,
		Example: "paddock image list --store ~/store",
		RunE: func(cmd *cobra.Command, _ []string) error {
			v, err := store.view(g)
			if err != nil {
				return err
			}
			list, err := v.List()
			if err != nil {
				return err
			}
			var rows []imageRow
			for _, i := range list {
				rows = append(rows, rowOf(i))
			}
			return show(cmd, g, rows, storedColumns)
		},
	}
	store.add(cmd)
	jsonFlag(cmd, g)
	return cmd
}

// imageDetails is all that inspect tells.
type imageDetails struct {
	imageRow
	NVRAM    string          `json:"nvram,omitempty"`
	Config   json.RawMessage `json:"config,omitempty"` // the VM config, as it was pushed
	DiskSize int64           `json:"disk_size"`        // bytes of the whole disk
	Zero     int64           `json:"zero_bytes"`       // of those, known to be zeros
	Chunks   []chunkRow      `json:"chunks,omitempty"`
	Shared   []sharedRow     `json:"shared,omitempty"`
}

type chunkRow struct {
	Layer    int          `json:"layer"`
	Offset   int64        `json:"offset"`
	Size     int64        `json:"size"`
	Content  fleet.Digest `json:"content"`
	Blob     fleet.Digest `json:"blob"`
	BlobSize int64        `json:"blob_size"`
	Zero     bool         `json:"zero,omitempty"`
}

type sharedRow struct {
	Digest fleet.Digest `json:"digest"`
	Ref    string       `json:"ref,omitempty"`
	Chunks int          `json:"chunks"`
	Bytes  int64        `json:"bytes"`
}

func imageInspectCommand(g *globals) *cobra.Command {
	var store storeFlag
	cmd := &cobra.Command{
		Use: "inspect IMAGE", Short: "Show what a store knows of an image", Args: cobra.ExactArgs(1),
		Long: `Show an image: where its disk is, its VM config, its chunks, and what it shares with the store's
other images. IMAGE is its reference, its digest, or the beginning of that. With --json all chunks
are listed.

` + aboutStore,
		Example: `paddock image inspect ghcr.io/acme/macos:15 --store ~/store
paddock image inspect 9f86d0 --json | jq -r .disk`,
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := store.view(g)
			if err != nil {
				return err
			}
			i, err := findImage(v, args[0])
			if err != nil {
				return err
			}
			d, err := details(v, i)
			if err != nil {
				return err
			}
			if g.output == "json" {
				return writeJSON(cmd.OutOrStdout(), d)
			}
			return d.print(cmd)
		},
	}
	store.add(cmd)
	jsonFlag(cmd, g)
	return cmd
}

func details(v *cache.View, i cache.Seen) (imageDetails, error) {
	d := imageDetails{imageRow: rowOf(i)}
	if i.Manifest == nil {
		return d, nil
	}
	d.DiskSize = i.Manifest.DiskSize
	for _, c := range i.Manifest.Chunks {
		d.Chunks = append(d.Chunks, chunkRow{Layer: c.Layer, Offset: c.Offset, Size: c.Size, Content: c.Content, Blob: c.Blob, BlobSize: c.BlobSize, Zero: c.Zero})
		if c.Zero {
			d.Zero += c.Size
		}
	}
	// A config that is not here yet, or no more, is left out.
	if raw, err := os.ReadFile(filepath.Join(i.Dir, vm.ConfigFile)); err == nil && json.Valid(raw) {
		d.Config = raw
	}
	if d.Disk != "" {
		d.NVRAM = filepath.Join(i.Dir, vm.NVRAMFile)
	}
	shared, err := v.Sharing(i)
	for _, s := range shared {
		d.Shared = append(d.Shared, sharedRow{Digest: s.With, Ref: s.Ref, Chunks: s.Chunks, Bytes: s.Bytes})
	}
	return d, err
}

// print is for people.
func (d imageDetails) print(cmd *cobra.Command) error {
	table := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
	line := func(title, format string, args ...any) {
		_, _ = fmt.Fprintf(table, title+"\t"+format+"\n", args...) // reported by Flush
	}
	line("ref", "%s", or(d.Ref, "-"))
	line("digest", "%s", d.Digest)
	line("state", "%s", d.state())
	if d.Error != "" {
		line("error", "%s", d.Error)
	}
	line("path", "%s", or(d.Disk, d.Dir))
	if d.DiskSize > 0 {
		line("disk", "%s, %s of it zeros; %s on this disk", size(d.DiskSize), or(size(d.Zero), "nothing"), or(size(d.DiskBytes), "0 B"))
		line("chunks", "%d, %s on the wire", len(d.Chunks), size(d.Total))
	}
	if c, err := vm.ReadConfig(d.Dir); err == nil {
		line("machine", "%s, %s, %s of memory", c.OS, count(c.CPUCount, "core"), or(size(c.MemorySize), "0 B"))
	}
	if !d.UsedAt.IsZero() {
		line("used", "%s ago", ago(d.UsedAt))
	}
	line("leases", "%s", or(strings.Join(d.Leases, ", "), "none"))
	for _, s := range d.Shared {
		line("shares", "%s in %s with %s", size(s.Bytes), count(s.Chunks, "chunk"), or(s.Ref, s.Digest.Short()))
	}
	return table.Flush()
}

func imageRemoveCommand(g *globals) *cobra.Command {
	var store storeFlag
	cmd := &cobra.Command{
		Use: "remove IMAGE", Short: "Remove an image from a store", Args: cobra.ExactArgs(1),
		Long: `Remove an image, or what is here of one, and free its room. IMAGE is its reference, its digest, or
the beginning of that. One that is leased is in use and stays; paddock image list shows by whom.

A store that a node's agent has open is the agent's: the controller orders what it holds.`,
		Example: "paddock image remove ghcr.io/acme/macos:14 --store ~/store",
		RunE: func(cmd *cobra.Command, args []string) error {
			return removeImage(cmd, g, store, args[0])
		},
	}
	store.add(cmd)
	jsonFlag(cmd, g)
	return cmd
}

func removeImage(cmd *cobra.Command, g *globals, store storeFlag, word string) error {
	v, err := store.view(g)
	if err != nil {
		return err
	}
	i, err := findImage(v, word)
	if err != nil {
		return err
	}
	// The store's own word on leases, when nobody else can take one.
	err = store.change(g, cache.Config{}, func(s *cache.Store) error { return s.Evict(i.Digest) })
	if errors.Is(err, cache.ErrLeased) {
		if i, lerr := v.Image(i.Digest); lerr == nil && len(i.Leases) > 0 {
			err = fmt.Errorf("image %s is in use by %s", i.Digest.Short(), strings.Join(i.Leases, ", "))
		}
		return fmt.Errorf("%w (hint: leases end with their VMs; those of VMs that are no more the agent drops at its start)", err)
	}
	if err != nil {
		return err
	}
	if g.output == "json" {
		return writeJSON(cmd.OutOrStdout(), map[string]any{"digest": i.Digest, "ref": i.Ref, "freed": i.DiskBytes})
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s (%s) is removed; %s are free\n", or(plainRef(i.Ref), "an image"), i.Digest.Short(), or(size(i.DiskBytes), "0 B"))
	return err
}
