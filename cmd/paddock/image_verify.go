package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
)

func imageVerifyCommand(g *globals) *cobra.Command {
	var (
		store  storeFlag
		repair bool
	)
	cmd := &cobra.Command{
		Use: "verify [IMAGE]", Short: "Read an image, or all of a store, and compare every digest", Args: cobra.MaximumNArgs(1),
		Long: `Read an image on disk, on all cores, and compare every chunk, the VM config and the NVRAM with the
digests of its manifest: for disks that rot. Without IMAGE all images of the store are verified, and
of those that are here in part what is. Each flaw is a line with its layer and its place on the
disk; the status is 1 if there is one.

With --repair a bad image is taken out of use: what is good of it is kept, and a pull fetches the
rest. That needs the store's lock, and no lease on the image.

--json prints an array with an object per image, good or not, or one object if it does not get
so far.
` + aboutFailure + `

` + aboutStore,
		Example: `paddock image verify --store ~/store
paddock image verify 9f86d0 --repair --store ~/store && paddock image pull REF --store ~/store`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, _, end := untilSignal(cmd.Context())
			defer end()
			return verifyImages(ctx, cmd, g, store, args, repair)
		},
	}
	store.add(cmd)
	cmd.Flags().BoolVar(&repair, "repair", false, "take bad images out of use, for a pull to fetch what is bad")
	jsonFlag(cmd, g)
	return cmd
}

// verdict is what verify found of one image.
type verdict struct {
	Digest   fleet.Digest `json:"digest"`
	Ref      string       `json:"ref,omitempty"`
	State    string       `json:"state"` // before the repair
	Flaws    []flawRow    `json:"flaws"`
	Error    string       `json:"error,omitempty"` // why it could not be verified
	Repaired bool         `json:"repaired,omitempty"`

	found []cache.Flaw
}

type flawRow struct {
	Kind   string `json:"kind"`
	Layer  int    `json:"layer"`
	Offset int64  `json:"offset"`
	Size   int64  `json:"size"`
	What   string `json:"what"`
}

func verifyImages(ctx context.Context, cmd *cobra.Command, g *globals, store storeFlag, args []string, repair bool) error {
	v, err := store.view(g)
	if err != nil {
		return err
	}
	images, err := v.List()
	if len(args) == 1 {
		var one cache.Seen
		one, err = findImage(v, args[0])
		images = []cache.Seen{one}
	}
	if err != nil {
		return err
	}
	verdicts := []*verdict{}
	for _, i := range images {
		found, err := verifyOne(ctx, cmd, g, v, i)
		if wasInterrupted(ctx, err) {
			return &interruptedError{fmt.Sprintf("%d of %s verified", len(verdicts), count(len(images), "image")), "nothing was changed; the same command begins again"}
		}
		verdicts = append(verdicts, found)
	}
	if repair {
		if err := repairImages(g, store, verdicts); err != nil {
			return err
		}
	}
	return tellVerdicts(cmd, g, verdicts)
}

// verifyOne verifies an image with a progress of its own; the error is only ctx's.
func verifyOne(ctx context.Context, cmd *cobra.Command, g *globals, v *cache.View, i cache.Seen) (*verdict, error) {
	name := or(plainRef(i.Ref), i.Digest.Short())
	bar := g.progress(cmd, name, inBytes)
	defer bar.end()
	found := &verdict{Digest: i.Digest, Ref: i.Ref, State: stateOf(i), Flaws: []flawRow{}}
	if !i.Ready && i.Manifest == nil {
		return found, nil // nothing of it is promised yet
	}
	flaws, err := v.Verify(ctx, i.Digest, bar.tell)
	if err != nil && ctx.Err() != nil {
		return nil, err
	}
	if err != nil {
		found.Error = err.Error()
	}
	found.found = flaws
	for _, f := range flaws {
		found.Flaws = append(found.Flaws, flawRow{Kind: f.Kind, Layer: f.Layer, Offset: f.Offset, Size: f.Size, What: f.String()})
	}
	return found, nil
}

// repairImages takes those with flaws out of use.
func repairImages(g *globals, store storeFlag, verdicts []*verdict) error {
	bad := 0
	for _, v := range verdicts {
		if len(v.found) > 0 {
			bad++
		}
	}
	if bad == 0 {
		return nil
	}
	return store.change(g, cache.Config{}, func(s *cache.Store) error {
		var errs []error
		for _, v := range verdicts {
			if len(v.found) == 0 {
				continue
			}
			if err := s.Repair(v.Digest, v.found); err != nil {
				errs = append(errs, fmt.Errorf("%w (hint: an image is repaired while nobody uses it; paddock image list shows who does)", err))
				continue
			}
			v.Repaired = true
		}
		return errors.Join(errs...)
	})
}

// tellVerdicts prints them; its error says that something is bad.
func tellVerdicts(cmd *cobra.Command, g *globals, verdicts []*verdict) error {
	flaws, bad, repaired, text := 0, 0, 0, ""
	for _, v := range verdicts {
		name := fmt.Sprintf("%s (%s)", or(plainRef(v.Ref), "image"), v.Digest.Short())
		switch {
		case v.Error != "":
			text += name + ": " + v.Error + "\n"
		case len(v.Flaws) == 0 && v.State == "partial":
			text += name + ": what is here is good\n"
		case len(v.Flaws) == 0:
			text += name + ": good\n"
		}
		for _, f := range v.Flaws {
			text += name + ": " + f.What + "\n"
		}
		if v.Error != "" || len(v.Flaws) > 0 {
			bad++
		}
		if v.Repaired {
			repaired++
		}
		flaws += len(v.Flaws)
	}
	var err error
	if g.output == "json" {
		err = writeJSON(cmd.OutOrStdout(), verdicts)
	} else {
		_, err = fmt.Fprint(cmd.OutOrStdout(), text)
	}
	if err != nil || bad == 0 {
		return err
	}
	err = flawed(verdicts, flaws, bad, repaired)
	if g.output == "json" {
		return &toldError{err}
	}
	return err
}

// flawed is the error of a verification that found something.
func flawed(verdicts []*verdict, flaws, bad, repaired int) error {
	hint := "--repair takes them out of use and keeps what is good; paddock image pull then fetches only the rest"
	switch {
	case repaired > 0:
		hint = "out of use now; fetch what was bad with: paddock image pull " + or(firstRepaired(verdicts), "REF")
	case flaws == 0:
		hint = "remove it and pull it again"
	}
	return fmt.Errorf("%s in %s of %s (hint: %s)", or(count(flaws, "flaw"), "flaws"), fmt.Sprint(bad), count(len(verdicts), "image"), hint)
}

// firstRepaired is the reference to be pulled again.
func firstRepaired(verdicts []*verdict) string {
	for _, v := range verdicts {
		if v.Repaired && v.Ref != "" {
			return plainRef(v.Ref) + "@" + string(v.Digest)
		}
	}
	return ""
}
