"""The competition's surface: merge, then answer queries; names and contract as in its starter kit."""
