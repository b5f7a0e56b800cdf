"""AWS as the host uses it: one client for each component, and the DynamoDB tables of marks and blobs."""
