"""One module a layout, each with an object LAYOUT. See `evenbits_backends.layout`."""
