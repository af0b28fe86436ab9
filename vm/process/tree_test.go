package process

import (
	"maps"
	"slices"
	"testing"
)

// The cast: a guest (100) in session 100 with a runner (101) and a step (102); a step's
// daemon (103) whose parent ended, still in the session; another (104) in a session of
// its own below the runner, with a child (105); one (106) that kept only the mark; a
// stranger (200) with a child; the driver (50), init and a kernel thread.
func TestMembers(t *testing.T) {
	host := []proc{
		{pid: 1, parent: 0, session: 1},
		{pid: 2, parent: 0, session: 0},
		{pid: 7, parent: 2, session: 0},
		{pid: 50, parent: 1, session: 50},
		{pid: 100, parent: 50, session: 100},
		{pid: 101, parent: 100, session: 100},
		{pid: 102, parent: 101, session: 100, zombie: true},
		{pid: 103, parent: 1, session: 100},
		{pid: 105, parent: 104, session: 104},
		{pid: 104, parent: 101, session: 104},
		{pid: 106, parent: 1, session: 106, marked: true},
		{pid: 107, parent: 106, session: 106},
		{pid: 200, parent: 1, session: 200},
		{pid: 201, parent: 200, session: 200},
	}
	for _, test := range []struct {
		name       string
		root, self int
		want       []int
	}{
		{"the driver looks", 100, 50, []int{100, 101, 102, 103, 104, 105, 106, 107}},
		{"the guest looks below itself", 100, 100, []int{101, 102, 103, 104, 105, 106, 107}},
		{"only the mark is known", 0, 50, []int{106, 107}},
		{"the guest is reaped", 999, 50, []int{106, 107}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := slices.Sorted(maps.Keys(members(host, test.root, test.self)))
			if !slices.Equal(got, test.want) {
				t.Errorf("members %v, want %v", got, test.want)
			}
		})
	}
}

func TestMembersOfALoop(t *testing.T) {
	// Listed while pids were reused, parents may form a loop.
	host := []proc{{pid: 10, parent: 11}, {pid: 11, parent: 10}}
	if got := members(host, 10, 99); len(got) != 2 {
		t.Errorf("members %v, want both", got)
	}
}
