package main

import (
	"fmt"
	"go/types"
	"path/filepath"
	"slices"
	"strings"

	"github.com/paddock-ci/paddock/tools/foreign"
)

// diff is where the stand-in differs, and how much was compared.
type diff struct {
	drifts         []string // "file:line: what differs", sorted by position
	names, members int
}

// comparison is one comparison under way.
type comparison struct {
	diff
	genuine, double *foreign.Package
}

// compare compares the exported names of double with those of genuine.
func compare(genuine, double *foreign.Package) diff {
	c := &comparison{genuine: genuine, double: double}
	scope := double.Types.Scope()
	for _, name := range scope.Names() {
		theirs := scope.Lookup(name)
		if !theirs.Exported() || c.isHook(theirs) {
			continue
		}
		c.names++
		ours := genuine.Types.Scope().Lookup(name)
		if ours == nil {
			c.drift(theirs, "there is no %s in the real package", name)
			continue
		}
		c.object(ours, theirs)
	}
	slices.Sort(c.drifts)
	return c.diff
}

// isHook: it is declared in a file of hooks, by which tests play with the stand-in.
func (c *comparison) isHook(o types.Object) bool {
	file := filepath.Base(c.double.Fset.Position(o.Pos()).Filename)
	return strings.HasPrefix(file, "standin_") && strings.HasSuffix(file, "hooks.go")
}

func (c *comparison) drift(at types.Object, format string, args ...any) {
	c.drifts = append(c.drifts, fmt.Sprintf("%s: %s", c.double.Fset.Position(at.Pos()), fmt.Sprintf(format, args...)))
}

// same compares how two types are written, and says so if they differ.
func (c *comparison) same(at types.Object, what string, genuine, double types.Type) {
	if g, d := written(genuine), written(double); g != d {
		c.drift(at, "%s is %s, in the real package %s", what, d, g)
	}
}

func (c *comparison) object(genuine, double types.Object) {
	name := double.Name()
	if g, d := kind(genuine), kind(double); g != d {
		c.drift(double, "%s is a %s, in the real package a %s", name, d, g)
		return
	}
	if d, ok := double.(*types.TypeName); ok {
		c.typeName(genuine.(*types.TypeName), d) // of the same kind
		return
	}
	c.same(double, name, genuine.Type(), double.Type())
	if d, ok := double.(*types.Const); ok {
		if g := genuine.(*types.Const); g.Val().ExactString() != d.Val().ExactString() { // of the same kind
			c.drift(double, "%s is %s, in the real package %s", name, d.Val(), g.Val())
		}
	}
}

// typeName compares what can be done with a type: its fields or its underlying type, and
// its methods.
func (c *comparison) typeName(genuine, double *types.TypeName) {
	name := double.Name()
	c.same(double, "the type parameters of "+name, parameters(genuine), parameters(double))
	switch d := double.Type().Underlying().(type) {
	case *types.Struct:
		c.fields(double, genuine.Type(), d)
	case *types.Interface:
		c.interfaces(double, genuine.Type().Underlying().(*types.Interface), d) // of the same kind
		return
	default:
		c.same(double, name, genuine.Type().Underlying(), d)
	}
	for _, form := range []struct {
		prefix          string
		genuine, double types.Type
	}{
		{"", genuine.Type(), double.Type()},
		{"*", types.NewPointer(genuine.Type()), types.NewPointer(double.Type())},
	} {
		c.methods(form.prefix+name, form.genuine, form.double)
	}
}

// fields compares the exported fields of a struct, and how they can be reached.
func (c *comparison) fields(at types.Object, genuine types.Type, double *types.Struct) {
	g, ok := genuine.Underlying().(*types.Struct)
	if !ok {
		c.drift(at, "%s is a struct, in the real package %s", at.Name(), written(genuine.Underlying()))
		return
	}
	byName := map[string]*types.Var{}
	for f := range g.Fields() {
		byName[f.Name()] = f
	}
	for f := range double.Fields() {
		if !f.Exported() || c.isHook(f) {
			continue
		}
		c.members++
		field := at.Name() + "." + f.Name()
		real, there := byName[f.Name()]
		switch {
		case !there:
			c.drift(f, "there is no field %s in the real package", field)
		case real.Embedded() != f.Embedded():
			c.drift(f, "%s is embedded in one of the two packages only", field)
		default:
			c.same(f, field, real.Type(), f.Type())
		}
	}
}

// interfaces compares the exported methods of interfaces. Where a method that is not
// exported seals one, nobody else can be it, and the stand-in may lack what nobody calls;
// else it must ask for neither more nor less.
func (c *comparison) interfaces(at types.Object, genuine, double *types.Interface) {
	want, sealed := exported(genuine)
	got, alsoSealed := exported(double)
	c.members += len(got)
	if sealed != alsoSealed {
		c.drift(at, "%s has a method that is not exported in one of the two packages only", at.Name())
	}
	for _, method := range got {
		if !slices.Contains(want, method) {
			c.drift(at, "%s has the method %s, in the real package %s", at.Name(), method, strings.Join(want, "; "))
		}
	}
	if !sealed && len(got) < len(want) {
		c.drift(at, "%s has the methods %s, in the real package %s", at.Name(), strings.Join(got, "; "), strings.Join(want, "; "))
	}
}

// methods compares the exported methods of a type, promoted ones too.
func (c *comparison) methods(name string, genuine, double types.Type) {
	set := types.NewMethodSet(genuine)
	for d := range types.NewMethodSet(double).Methods() {
		method := d.Obj()
		if !method.Exported() || c.isHook(method) {
			continue
		}
		c.members++
		g := set.Lookup(nil, method.Name())
		if g == nil {
			c.drift(method, "(%s).%s is not in the real package", name, method.Name())
			continue
		}
		c.same(method, fmt.Sprintf("(%s).%s", name, method.Name()), g.Obj().Type(), method.Type())
	}
}

func kind(o types.Object) string {
	switch o := o.(type) {
	case *types.Const:
		return "constant"
	case *types.Var:
		return "variable"
	case *types.Func:
		return "function"
	case *types.TypeName:
		switch _, isInterface := o.Type().Underlying().(*types.Interface); {
		case o.IsAlias():
			return "type by another name"
		case isInterface:
			return "interface"
		}
		return "type"
	}
	return fmt.Sprintf("%T", o)
}

// parameters are the type parameters of a generic type, as a tuple.
func parameters(o *types.TypeName) types.Type {
	var list []*types.Var
	if named, ok := o.Type().(*types.Named); ok {
		for p := range named.TypeParams().TypeParams() {
			list = append(list, types.NewParam(0, nil, p.Obj().Name(), p.Constraint()))
		}
	}
	return types.NewTuple(list...)
}

// exported writes the exported methods of an interface, embedded ones too, and says
// whether it has others.
func exported(i *types.Interface) (all []string, sealed bool) {
	for m := range i.Methods() {
		if m.Exported() {
			all = append(all, m.Name()+strings.TrimPrefix(written(m.Type()), "func"))
		} else {
			sealed = true
		}
	}
	return all, sealed
}

// written is a type as it is written with whole package paths and without the names of
// parameters, which are no part of it.
func written(t types.Type) string { return types.TypeString(nameless(t), (*types.Package).Path) }

// nameless takes the names of parameters out of the function types in t.
func nameless(t types.Type) types.Type {
	switch t := t.(type) {
	case *types.Signature:
		return types.NewSignatureType(nil, nil, nil, namelessAll(t.Params()), namelessAll(t.Results()), t.Variadic())
	case *types.Pointer:
		return types.NewPointer(nameless(t.Elem()))
	case *types.Slice:
		return types.NewSlice(nameless(t.Elem()))
	case *types.Map:
		return types.NewMap(nameless(t.Key()), nameless(t.Elem()))
	case *types.Chan:
		return types.NewChan(t.Dir(), nameless(t.Elem()))
	}
	return t
}

func namelessAll(t *types.Tuple) *types.Tuple {
	list := make([]*types.Var, 0, t.Len())
	for v := range t.Variables() {
		list = append(list, types.NewParam(0, nil, "", nameless(v.Type())))
	}
	return types.NewTuple(list...)
}
