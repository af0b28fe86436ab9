// Package objc is where an object of Apple's would be. There is none here: it only seals
// the interfaces as the real package does. Called by the stand-in.
package objc

// Pointer would hold an object.
type Pointer struct{ _ byte } // not empty, so that two are two

func (*Pointer) object() {}

// NSObject is whatever has a Pointer.
type NSObject interface{ object() }
