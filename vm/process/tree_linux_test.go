package process

import "testing"

func TestParseStat(t *testing.T) {
	p, err := parseStat([]byte("12 (a) Z (b) 7) S 34 56 78 0 -1"))
	if err != nil || p.parent != 34 || p.session != 78 || p.zombie {
		t.Errorf("%+v, %v", p, err)
	}
	p, err = parseStat([]byte("12 (sh) Z 1 2 3"))
	if err != nil || !p.zombie {
		t.Errorf("%+v, %v; want a zombie", p, err)
	}
}

// FuzzParseStat: a process chooses its own name, which stands in the middle of stat.
func FuzzParseStat(f *testing.F) {
	f.Add([]byte("12 (sh) S 1 2 3 4"))
	f.Add([]byte(") Z 1 1 1"))
	f.Add([]byte("1 (x"))
	f.Fuzz(func(t *testing.T, name []byte) {
		_, _ = parseStat(name) // by itself it is anything: no panic is all that is asked
		p, err := parseStat(append(append([]byte("5 ("), name...), ") R 6 7 8 9"...))
		if err != nil || p.parent != 6 || p.session != 8 {
			t.Errorf("a process called %q: %+v, %v", name, p, err)
		}
	})
}
